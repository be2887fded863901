#pragma once
// Kernels written as text inside a test: compiled and launched on the emulator with one buffer in and one
// out.
#include "device.h"
#include "emulator.h"
#include <cstring>
#include <string>
#include <vector>

namespace kda::emulator {

/// The body of a kernel. `in` and `out` are the buffers as float*, `shared` the shared memory as float*.
[[nodiscard]] SourceUnit kernel_text(const std::string& body);

struct Run {
  Options options;
  unsigned grid = 1, threads = 32, shared_bytes = 0;
  std::vector<float> in;
  std::size_t outputs = 0;
  TensorMapFields map{}; ///< of `in`; the kernel has it as `map`
};
/// What the kernel left in `out` (NaN where it wrote nothing), or the error of its launch.
[[nodiscard]] Result<std::vector<float>> run_text(const std::string& body, const Run& run);

} // namespace kda::emulator
