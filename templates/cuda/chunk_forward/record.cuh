#pragma once
// What kda_forward_prepare leaves for kda_forward_scan: one record of factors a chunk and value head, in
// bf16 unless said otherwise. "Fragments" are 16x16 tiles as 32 lanes hold them, 16 bytes a lane, so that
// both kernels move them without ldmatrix and without bank conflicts.
#include "stages/pair.cuh"
#include "stages/tile.cuh"

namespace kda {

constexpr int kFragmentBytes = 512;
constexpr int kKeyBlocks = kPaddedK / 16;
constexpr int kValueBlocks = kPaddedV / 16;

/// Byte offsets. The scan copies [0, u) as it is, and u by value tile. q and k are swizzled and not padded:
/// rows that do not begin at a sector would leave sectors half written.
struct Record {
  using KeyTile = SwizzledTile<kPaddedK>;
  static constexpr int w = 0; ///< W, B fragments [token tile][channel block]
  static constexpr int m = w + kChunkTiles * kKeyBlocks * kFragmentBytes; ///< M, A fragments [pair_place]
  static constexpr int decay = m + kChunkPairs * kFragmentBytes;          ///< 2^tot, fp32 [kPaddedK]
  static constexpr int q = decay + kPaddedK * 4;                          ///< scale q 2^G, a KeyTile
  static constexpr int k = q + KeyTile::bytes(Config::chunk);             ///< k 2^(tot - G), a KeyTile
  static constexpr int u = k + KeyTile::bytes(Config::chunk); ///< u^T, accumulators [value block][token tile]
  static constexpr int bytes = u + Config::chunk * kPaddedV * 2;
};

/// Workspace slots: 0 the first chunk of each sequence (packed only), 1 the records [chunk][value head].
KDA_DEVICE const int* chunk_offsets(const KernelArgs& args) {
  return static_cast<const int*>(args.workspace[0]);
}
KDA_DEVICE unsigned char* record_of(const KernelArgs& args, i64 chunk, int head) {
  return static_cast<unsigned char*>(args.workspace[1]) + (chunk * args.value_heads + head) * Record::bytes;
}
KDA_DEVICE Word4* fragment(unsigned char* base, int index) {
  return reinterpret_cast<Word4*>(base + index * kFragmentBytes) + lane_index();
}
KDA_DEVICE const Word4* fragment(const unsigned char* base, int index) {
  return reinterpret_cast<const Word4*>(base + index * kFragmentBytes) + lane_index();
}

} // namespace kda
