#pragma once
// 8x8 matrices of 16-bit values between registers and shared memory. Registers hold them as
// mma fragments: lane l has elements 2(l%4), 2(l%4)+1 of row l/4.
#include "primitives/mma.cuh"

namespace kda {

/// stmatrix (sm_90 and later): four matrices; lane l gives the address of row l%8 of matrix l/8, 16-byte
/// aligned.
KDA_DEVICE void store_matrix_x4(void* row, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
/// The same, each 8x8 matrix transposed.
KDA_DEVICE void store_matrix_x4_transposed(void* row, const u32 (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}
/// The transpose of one matrix, in registers (sm_75 and later).
KDA_DEVICE u32 transpose_matrix(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

} // namespace kda
