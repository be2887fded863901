#pragma once
// A Backend that runs CUDA kernels on the CPU, thread for thread: the emitter's source units compiled by the
// host compiler against tests/emulator/primitives.
#include "backend.h"

namespace kda::emulator {

/// When cp.async completes. `late`: at the wait; its destination holds NaN until then. `early`: at once.
enum class Copies : std::uint8_t { late, early };

struct Options {
  std::string arch = "sm_90a";
  /// Order in which warps and lanes run. 0: ascending, 1: descending, others: random, redrawn on the way.
  std::uint64_t seed = 0;
  Copies copies = Copies::late;
  int threads = 2;  ///< CTAs at a time
  int optimize = 1; ///< -O level of the compiled kernels; 0 and a debugger go well together
  /// Every access is checked: races, missing waits and proxy fences in shared memory, reads of what nobody
  /// wrote, global memory that two CTAs of a launch share. Several times slower.
  bool checked = false;
  /// CPU time that one thread may run without a barrier or warp operation before the launch fails, and a
  /// tenth of what a block may run without the end of a barrier or thread.
  double watchdog_seconds = 20;
};

/// Faults of a kernel come back from `launch` as device_error, with the place in the source: out-of-bounds
/// accesses, misaligned vectors, barriers and warp operations that not every thread reaches.
[[nodiscard]] Result<std::shared_ptr<Backend>> make_backend(const Options& options = {});

} // namespace kda::emulator
