#pragma once
// What kda_prepare leaves for the scans: one record of factors a chunk and value head, in bf16 unless said
// otherwise. "Fragments" are 16x16 tiles as 32 lanes hold them, 16 bytes a lane, so that kernels move them
// without ldmatrix and without bank conflicts.
#include "stages/pair.cuh"
#include "stages/tile.cuh"

namespace kda {

constexpr int kFragmentBytes = 512;
constexpr int kKeyBlocks = kPaddedK / 16;
constexpr int kValueBlocks = kPaddedV / 16;

/// Byte offsets. Scans copy what they need as it is: [0, u) and u by value tile, or [w, u). Key tiles are
/// swizzled and not padded: rows that do not begin at a sector would leave sectors half written. The reverse
/// scan of the backward multiplies by W and M from the other side, so there W is a key tile and M is
/// transposed.
struct Record {
  using KeyTile = SwizzledTile<kPaddedK>;
  static constexpr int m = 0; ///< M [pair_place]: A fragments, or for the backward B fragments (K = rows)
  static constexpr int q = m + kChunkPairs * kFragmentBytes;  ///< scale q 2^G, a KeyTile
  static constexpr int w = q + KeyTile::bytes(Config::chunk); ///< W, B fragments [token tile][channel block]
  static constexpr int decay = w + KeyTile::bytes(Config::chunk); ///< 2^tot, fp32 [kPaddedK]
  static constexpr int k = decay + kPaddedK * 4;                  ///< k 2^(tot - G), a KeyTile
  static constexpr int u = k + KeyTile::bytes(Config::chunk); ///< u^T, accumulators [value block][token tile]
  static constexpr int x = u + Config::chunk * kPaddedV * 2;  ///< backward: X^T, A fragments [pair_place][2]:
                                                              ///< rounded, and what rounding left
  static constexpr int bytes = x + (Config::backward ? 2 * kChunkPairs * kFragmentBytes : 0);
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
