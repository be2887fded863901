#pragma once
// Runs a test case on a Backend, below the engine: emit -> compile -> load -> launch, and compares.
#include "backend.h"
#include "random_case.h"

namespace kda::test {

struct RunOptions {
  bool strided = false;         ///< gaps between heads, tokens, batch rows and states
  bool optional_outputs = true; ///< final_state, d_A_log, d_dt_bias, d_initial_state
};

/// How one output compares with float64.
struct TensorReport {
  std::string name;
  double error = 0;           ///< |a - b| / |b| in the 2-norm; infinity when an element is not finite
  std::size_t not_finite = 0; ///< elements
  double largest = 0;         ///< largest difference of an element ...
  std::string place;          ///< ... its coordinates, and both values
  reference::Array values{};  ///< what the device left
};
struct RunReport {
  std::vector<TensorReport> tensors;
  int launches = 0;
  double milliseconds = 0; ///< of the launches
};

/// Fails with device_error also when an input, a gap between rows or the memory around a buffer was written.
/// Outputs and each slot of the workspace are buffers of their own that hold NaN before the call.
[[nodiscard]] Result<RunReport> run_case(const Backend&, const TestCase&, const Variant&, RunOptions = {});
/// The same with a source that the caller has emitted, and perhaps changed: to plant a fault.
[[nodiscard]] Result<RunReport> run_unit(const Backend&, const SourceUnit&, const TestCase&, const Variant&,
                                         RunOptions = {});
/// The same with what the caller has compiled.
[[nodiscard]] Result<RunReport> run_image(const Backend&, const SourceUnit&, const Image&, const TestCase&,
                                          const Variant&, RunOptions = {});
/// The error that a right kernel stays below, whatever the device: 1e-3 to 2e-2 for tensor cores, and for
/// fp32 arithmetic 2e-5 and one rounding of the output.
[[nodiscard]] double tolerance(const Problem&, const Variant&, const std::string& tensor);
/// A line a tensor.
[[nodiscard]] std::string to_string(const RunReport&);

} // namespace kda::test
