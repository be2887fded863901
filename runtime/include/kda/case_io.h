#pragma once
// KDA problems in safetensors files: one path from a file to the float64 reference and to a device, used by
// `kda-jit run`, `kda-jit check` and the tests.
//
//   tensor          shape                        dtype
//   q, k            [T,H,K] or [B,T,H,K]         BF16, F16 or F32, one for q, k and v
//   v               [T,HV,V] or [B,T,HV,V]
//   g, beta         [..,HV,K], [..,HV]           BF16, F16 or F32
//   A_log, dt_bias  [HV], [HV,K]                 F32; optional where the gate allows
//   initial_state   [N,HV,K,V] or [N,HV,V,K]     F32, BF16 or F16; optional
//   cu_seqlens      [N+1]                        I64 or I32; optional, then B must be 1 (or absent)
//   do, dht         as o and final_state         optional: the gradients that come in
//
// metadata: gate (precomputed or log_e, log2, softplus, bounded, bounded_no_a; required), has_A_log (False
// makes a bounded gate bounded_no_a), lower_bound, scale, beta_sigmoid, allow_neg_eigval, qk_l2norm,
// state_layout (KV or VK). Other keys are ignored.
#include "kda/engine.h"
#include "kda/reference.h"
#include "kda/safetensors.h"

namespace kda {

struct Case {
  std::string name; ///< metadata `name`, may be empty
  Problem problem;  ///< operation forward; dtypes and layout as in the file
  Sizes sizes;
  double scale = 0; ///< 0: K^-1/2
  double lower_bound = -5;
  std::vector<std::int64_t> cu_seqlens; ///< empty when not packed
  safetensors::File file;
};
/// invalid_argument with the tensor and what was expected of it. cu_seqlens is checked here, as it is on the
/// host: starts at 0, does not decrease, ends at or before T.
[[nodiscard]] Result<Case> make_case(safetensors::File file);
[[nodiscard]] Result<Case> read_case(const std::filesystem::path&);

[[nodiscard]] reference::Inputs reference_inputs(const Case&);
/// do and dht; empty arrays where the file has none.
[[nodiscard]] reference::OutputGradients reference_output_gradients(const Case&);
/// Any tensor of the file in float64, states in [K,V]; empty when it is not there.
[[nodiscard]] reference::Array values(const Case&, const std::string& tensor);

/// Rounds to nearest even.
[[nodiscard]] std::vector<std::byte> pack(const reference::Array&, DType);
[[nodiscard]] reference::Array unpack(const std::vector<std::byte>&, safetensors::DType);
/// Swaps the last two dims of [.., rows, columns].
[[nodiscard]] reference::Array transposed(const reference::Array&, int rows, int columns);
[[nodiscard]] safetensors::DType file_dtype(DType);

/// The tensors of one call in a device's memory; outputs are filled with NaN before the call. Move only.
class DeviceCase {
public:
  /// `problem`: the case's, with any of forward, recurrent and backward, any dtypes and state layout; values
  /// are rounded to its dtypes. Backward needs `do` in the file.
  [[nodiscard]] static Result<DeviceCase> upload(const Engine&, Device, const Case&, const Problem& problem);

  [[nodiscard]] const Args& args() const { return args_; }
  /// An output by its name in the file (o, final_state, dq, dk, dv, dg, dbeta, dA_log, ddt_bias,
  /// dinitial_state), states in [K,V]; waits for the device. invalid_argument for one that the call does not
  /// write.
  [[nodiscard]] Result<reference::Array> output(const std::string& name) const;
  /// The same as a tensor of a file: the problem's dtype and layout.
  [[nodiscard]] Result<safetensors::Tensor> output_tensor(const std::string& name) const;
  [[nodiscard]] std::vector<std::string> output_names() const;

private:
  struct Memory;
  std::shared_ptr<Memory> memory_;
  Args args_;
};

} // namespace kda
