#pragma once
// The float64 reference as a module: what the host runs where it has no kernel. One thread, deterministic.
#include "backend.h"

namespace kda {

/// For operation backward. A launch fails with out_of_memory or, for a malformed cu_seqlens,
/// with invalid_argument.
[[nodiscard]] std::shared_ptr<const Module> make_reference_module(const Problem&);

} // namespace kda
