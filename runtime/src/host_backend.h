#pragma once
// The CPU as a Backend: LLVM IR text -> object -> ORC. Built when KDA_JIT_HOST is on.
#include "backend.h"

namespace kda {

/// `threads` is at least 1. unavailable in a build without LLVM.
[[nodiscard]] Result<std::shared_ptr<Backend>> make_host_backend(int threads);

} // namespace kda
