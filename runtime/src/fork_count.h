#pragma once
#include <cstdint>

namespace kda {

/// How many fork()s lie between this process and the one that loaded the library. An engine that was made at
/// another count is of no use here: its threads, its CUDA contexts and its database connection stayed with
/// the parent.
[[nodiscard]] std::uint32_t fork_count();

} // namespace kda
