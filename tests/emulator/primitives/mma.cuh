#pragma once
// Host version of templates/cuda/primitives/mma.cuh; the fragment layouts stand there.
#include "primitives/basic.cuh"

namespace kda {

/// Offset in the CTA's shared memory.
KDA_DEVICE u32 shared_address(const void* p) {
  return static_cast<u32>(static_cast<const unsigned char*>(p) - emulator::current().shared);
}

KDA_DEVICE void load_matrix_x4(u32 (&r)[4], const void* row) {
  emulator::LoadMatrixArguments arguments{r, row};
  emulator::current().services->collective(emulator::WarpOperation::load_matrix, &arguments);
}
KDA_DEVICE void load_matrix_x4_transposed(u32 (&r)[4], const void* row) {
  emulator::LoadMatrixArguments arguments{r, row};
  emulator::current().services->collective(emulator::WarpOperation::load_matrix_transposed, &arguments);
}
template <class T>
KDA_DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
KDA_DEVICE void mma_16x8x16<bf16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulator::MmaArguments arguments{d, a, b0, b1};
  emulator::current().services->collective(emulator::WarpOperation::mma_bf16, &arguments);
}
template <>
KDA_DEVICE void mma_16x8x16<fp16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulator::MmaArguments arguments{d, a, b0, b1};
  emulator::current().services->collective(emulator::WarpOperation::mma_fp16, &arguments);
}
/// Round to nearest, ties away from zero, to 10 bits of mantissa.
KDA_DEVICE float to_tf32(float x) {
  const u32 u = float_bits(x);
  if ((u & 0x7f800000u) == 0x7f800000u) return x;
  return bits_float((u + 0x1000u) & 0xffffe000u);
}
KDA_DEVICE void mma_16x8x8_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  emulator::MmaArguments arguments{d, a, float_bits(b0), float_bits(b1)};
  emulator::current().services->collective(emulator::WarpOperation::mma_tf32, &arguments);
}

} // namespace kda
