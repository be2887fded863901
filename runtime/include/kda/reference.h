#pragma once
// The ground truth in float64: the token recurrence, its chunk form and its adjoint, straight from the
// formulas.
#include "codegen/problem.h"
#include <cstdint>
#include <vector>

namespace kda::reference {

using Array = std::vector<double>;

/// Contiguous float64 copies of the tensors of kda::Args; an absent optional one is empty. States are
/// [N,HV,K,V] here, whatever problem.state_layout says. dtypes of the problem are ignored.
struct Inputs {
  Problem problem;
  Sizes sizes;
  double scale = 0; ///< 0: K^-1/2
  double lower_bound = -5;
  Array q, k, v, g, beta, A_log, dt_bias, initial_state;
  std::vector<std::int64_t> cu_seqlens; ///< empty when not packed
};
struct Outputs {
  Array o, final_state;
};
struct OutputGradients {
  Array d_o, d_final_state; ///< d_final_state may be empty: zero
};
struct Gradients {
  Array d_q, d_k, d_v, d_g, d_beta, d_A_log, d_dt_bias, d_initial_state;
};

/// Token by token: S <- diag(e^g) S; u = beta (v - S^T k); S <- S + k u^T; o = scale S^T q.
[[nodiscard]] Outputs recurrence(const Inputs&);
/// What a verify of drafts leaves. Rows as in Inputs; `states` is by token, [B*T,HV,K,V].
struct Verified {
  Array o, states, u, k, decay;
};
/// `parents`: of every token of the flattened token axis, counted in its sequence, -1 for the initial state;
/// empty: the token before.
[[nodiscard]] Verified verify(const Inputs&, const std::vector<std::int64_t>& parents = {});
/// The state of each sequence after the token accepted[n] - 1 and its ancestors, from in.initial_state and
/// the updates; the initial state where accepted[n] is 0.
[[nodiscard]] Array replay(const Inputs& in, const Verified& updates,
                           const std::vector<std::int64_t>& accepted,
                           const std::vector<std::int64_t>& parents = {});
/// The same by chunks of `chunk` tokens (any length), through L, M and the triangular inverse.
[[nodiscard]] Outputs chunked(const Inputs&, int chunk);
/// The adjoint of `recurrence`: every gradient with respect to the inputs as given (before norm, gate,
/// sigmoid). d_initial_state is there also without an initial state (the gradient at zero); d_A_log and
/// d_dt_bias are empty where the problem does not read them.
[[nodiscard]] Gradients adjoint(const Inputs&, const OutputGradients&);
/// Natural-log decay of g, [B,T,HV,K].
[[nodiscard]] Array gate(const Inputs&);
/// Gradients of `gate` alone: d_g, d_A_log, d_dt_bias from d_gate.
[[nodiscard]] Gradients gate_adjoint(const Inputs&, const Array& d_gate);

/// |a - b| / |b| in the 2-norm, infinity when anything is not finite; |a| when b is zero.
[[nodiscard]] double relative_error(const Array& a, const Array& b);

} // namespace kda::reference
