#pragma once
// From the caller's Args to the one parameter of a kernel, with every check that needs no device.
#include "cuda/kernel_args.cuh"
#include "kda/engine.h"

namespace kda {

/// Sizes that a problem cannot have: negative, or N != B when not packed, or B != 1 when packed.
[[nodiscard]] Status check_sizes(const Problem&, const Sizes&);

/// Checks presence, dtype, rank, shape, strides and alignment and fills everything but the workspace. The
/// sizes are read off the tensors. Allocates nothing unless it refuses. cu_seqlens is only looked at when
/// `host_memory`.
[[nodiscard]] Status make_kernel_args(const Problem&, const Args&, bool host_memory, KernelArgs&, Sizes&);

} // namespace kda
