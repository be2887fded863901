#pragma once
// What the kernels of the chunk backward leave for each other. Slots 0 and 1 are those of chunk/record.cuh;
// the others hold, for [chunk][value head]:
//   2, 3: S at the chunk's start and its gradient D at the chunk's end, both transposed and as A fragments
//         [value block][channel block]
//   4:    U, transposed accumulators [value block][token tile]
//   5:    its gradient dU, the same [value block][token tile][2]: rounded, and what rounding left
//   8, 9: for grouped value heads only, a value head's part of dq and dk, fp32 [C][K]
// Chunks are those of one slab (slab.cuh), but for these, which keep every chunk of the call:
//   6, 7: this chunk's part of d dt_bias, fp32 [kPaddedK], and of d A_log, fp32
// Slots 10 to 12 are those of slab.cuh.
#include "chunk/record.cuh"

namespace kda {

constexpr int kStateBytes = kValueBlocks * kKeyBlocks * kFragmentBytes;
constexpr int kValuesBytes = kValueBlocks * kChunkTiles * kFragmentBytes;

template <int slot>
KDA_DEVICE float* part_of(const KernelArgs& args, i64 chunk, int head) {
  static_assert(slot == 8 || slot == 9);
  return static_cast<float*>(args.workspace[slot]) +
         (chunk * args.value_heads + head) * (Config::chunk * Config::K);
}
template <int slot>
KDA_DEVICE unsigned char* chunk_slot(const KernelArgs& args, i64 chunk, int head) {
  constexpr int bytes = slot <= 3 ? kStateBytes : slot == 4 ? kValuesBytes : 2 * kValuesBytes;
  return static_cast<unsigned char*>(args.workspace[slot]) + (chunk * args.value_heads + head) * bytes;
}

} // namespace kda
