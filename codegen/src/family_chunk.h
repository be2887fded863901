#pragma once
// What chunk_forward.cu and chunk_backward.cu share: sizes, launch and time of kda_prepare. The constants of
// the templates (stages/tile.cuh, chunk/*.cuh) stand here a second time, as functions of problem and variant.
#include "family.h"
#include <algorithm>
#include <cmath>
#include <fmt/format.h>
#include <initializer_list>

namespace kda {

constexpr int kTileRows = 16;

/// Bytes of `rows` rows of a Tile<columns> (8 elements of padding a row).
[[nodiscard]] constexpr int tile_bytes(int rows, int columns) {
  return rows * (columns + 8) * 2;
}
[[nodiscard]] constexpr int chunk_pairs(int chunk) {
  const int tiles = chunk / kTileRows;
  return tiles * (tiles + 1) / 2;
}

/// chunk/record.cuh.
[[nodiscard]] inline int record_bytes(const Problem& p, const Variant& v) {
  const int k = padded(p.key_dim);
  const int inverse = p.operation == Operation::backward ? 2 * chunk_pairs(v.chunk) * 512 : 0;
  return 3 * v.chunk * k * 2 + chunk_pairs(v.chunk) * 512 + k * 4 + v.chunk * padded(p.value_dim) * 2 +
         inverse;
}

/// chunk/prepare.cuh: tiles of a CTA and its shared memory.
[[nodiscard]] inline int prepare_tiles(const Problem& p, const Variant& v) {
  int tiles = 4;
  while (tiles > v.chunk / kTileRows && v.prepare_warps * 32 / tiles * 4 < padded(p.key_dim))
    tiles /= 2;
  return tiles;
}
[[nodiscard]] inline int prepare_chunks(const Problem& p, const Variant& v) {
  return prepare_tiles(p, v) * kTileRows / v.chunk;
}
[[nodiscard]] inline int prepare_shared(const Problem& p, const Variant& v) {
  const int tiles = prepare_tiles(p, v), rows = tiles * kTileRows;
  const int key_tile = tile_bytes(rows, padded(p.key_dim));
  const int sums = tiles * padded(p.key_dim) * 4;
  const int fixed = key_tile + sums + 3 * rows * 4 + (prepare_chunks(p, v) * 24 + 15) / 16 * 16;
  const int solve =
      rows * (v.chunk + 8) * 4 + 2 * tile_bytes(rows, v.chunk) + tile_bytes(rows, padded(p.value_dim));
  return fixed + std::max(3 * key_tile + 2 * sums, solve);
}

[[nodiscard]] inline int value_tiles(const Problem& p, const Variant& v) {
  return (padded(p.value_dim) + v.value_tile - 1) / v.value_tile;
}
[[nodiscard]] inline std::int64_t prepare_ctas(const Problem& p, const Variant& v, const Sizes& s) {
  const int chunks = prepare_chunks(p, v);
  return (chunk_bound(p, s, v.chunk) + chunks - 1) / chunks * p.value_heads;
}
constexpr double kBytesPerUs = 3.0e6;   // device copy
constexpr double kL2BytesPerUs = 5.5e6; // records that several value tiles read
constexpr double kPrepareUs = 12;       // launch, first loads and the last CTA's end
[[nodiscard]] inline double prepare_us(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  const double tokens = static_cast<double>(chunk_bound(p, s, v.chunk)) * v.chunk * p.value_heads;
  const double bytes = 2.0 * p.key_dim * size_of(p.dtype) + p.value_dim * size_of(p.dtype) +
                       p.key_dim * size_of(p.gate_dtype) + size_of(p.beta_dtype) +
                       static_cast<double>(record_bytes(p, v)) / v.chunk;
  // Of 64 tokens when CTAs fill the SM; longer chunks have more pairs and a longer solve.
  const int chunk_tiles = v.chunk / kTileRows;
  const double block_us = v.prepare_warps == 4 ? 7.0 + 0.5 * chunk_tiles : 6.3 + 0.42 * chunk_tiles;
  const double width = (padded(p.key_dim) + padded(p.value_dim)) / 256.0;
  const double busy = tokens / 64 * block_us * width / t.multiprocessors;
  return kPrepareUs + std::max(tokens * bytes / kBytesPerUs, busy);
}

/// Why a chunk variant does not fit, but for what the family alone knows (registers, shared memory).
[[nodiscard]] inline std::string reject_tiles(const Problem& p, const Variant& v) {
  if (p.dtype == DType::fp32) return "tensor-core operands are 16 bits; the token kernels serve fp32 tensors";
  if (v.value_tile > std::max(padded(p.value_dim), 16))
    return fmt::format("a tile of {} columns is wider than V={}", v.value_tile, p.value_dim);
  if (v.value_tile / 16 > v.scan_warps)
    return fmt::format("a warp of the scan owns 16 columns, and {} need {} warps", v.value_tile,
                       v.value_tile / 16);
  const int tile_threads = v.prepare_warps * 32 / prepare_tiles(p, v);
  if (tile_threads * 4 < padded(p.key_dim))
    return fmt::format("{} threads with 4 channels each do not cover K={}", tile_threads, p.key_dim);
  return {};
}
/// The same of what a scan thread and the CTAs ask for.
[[nodiscard]] inline std::string reject_limits(const Target& t, int registers, int most_registers,
                                               std::initializer_list<int> shared) {
  if (registers > most_registers)
    return fmt::format("the scan needs about {} registers a thread of 255", registers);
  for (const int need : shared)
    if (need > t.max_shared_bytes)
      return fmt::format("needs {} bytes of shared memory, {} allows {}", need, t.arch, t.max_shared_bytes);
  return {};
}

} // namespace kda
