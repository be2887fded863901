#pragma once
// From the caller's Args to the one parameter of a kernel, with every check that needs no device.
#include "codegen/source_unit.h"
#include "cuda/kernel_args.cuh"
#include "kda/engine.h"

namespace kda {

/// Sizes that a problem cannot have: negative, or N != B when not packed, or B != 1 when packed.
[[nodiscard]] Status check_sizes(const Problem&, const Sizes&);

/// KernelArgs::head_reciprocal: floor(n * this / 2^32) is n / value_heads or one less, for every n < 2^32.
[[nodiscard]] constexpr unsigned head_reciprocal(int value_heads) {
  return value_heads == 1 ? 0xFFFFFFFFU
                          : static_cast<unsigned>((1ULL << 32U) / static_cast<unsigned>(value_heads));
}

/// Checks presence, dtype, rank, shape, strides and alignment and fills everything but the workspace. The
/// sizes are read off the tensors. Allocates nothing unless it refuses. cu_seqlens is only looked at when
/// `host_memory`.
[[nodiscard]] Status make_kernel_args(const Problem&, const Args&, bool host_memory, KernelArgs&, Sizes&);

/// What slabs are made of; which one it is, every launch says.
inline void set_slabs(const Slabs& slabs, KernelArgs& args) {
  args.slab_chunks = slabs.chunks;
  args.slab_rows = slabs.rows;
  args.slab_pieces = slabs.pieces;
}

} // namespace kda
