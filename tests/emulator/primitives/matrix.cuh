#pragma once
// Host version of templates/cuda/primitives/matrix.cuh.
#include "primitives/mma.cuh"

namespace kda {

KDA_DEVICE void store_matrix_x4(void* row, const u32 (&r)[4]) {
  emulator::StoreMatrixArguments arguments{r, row};
  emulator::current().services->collective(emulator::WarpOperation::store_matrix, &arguments);
}
KDA_DEVICE void store_matrix_x4_transposed(void* row, const u32 (&r)[4]) {
  emulator::StoreMatrixArguments arguments{r, row};
  emulator::current().services->collective(emulator::WarpOperation::store_matrix_transposed, &arguments);
}
KDA_DEVICE u32 transpose_matrix(u32 x) {
  emulator::WordArguments arguments{x, 0};
  emulator::current().services->collective(emulator::WarpOperation::move_matrix, &arguments);
  return arguments.result;
}

} // namespace kda
