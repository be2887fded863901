// The token recurrence and its adjoint in float64 (kda-reference 1.1), one value head of one sequence at a
// time.
#include "kda/reference.h"
#include "reference_detail.h"
#include <algorithm>

namespace kda::reference {
namespace {

using detail::Activated;
using detail::add_scaled;
using detail::dot;
using detail::Span;

/// One token: state S [K,V] becomes diag(decay) S, then S + k u^T. `u` [V] receives beta (v - S^T k);
/// `decayed`, when wanted, the state between the two.
void step(const Activated& a, const Inputs& in, std::int64_t t, std::size_t hv, double* S, double* u,
          double* decayed = nullptr) {
  const std::size_t K = a.key_dim, V = a.value_dim;
  const double* const k = &a.k[a.key_row(t, hv)];
  const double* const v = &in.v[a.head_row(t, hv) * V];
  const double* const decay = &a.decay[a.head_row(t, hv) * K];
  const double beta = a.beta[a.head_row(t, hv)];
  std::copy_n(v, V, u);
  for (std::size_t d = 0; d < K; ++d) {
    for (std::size_t j = 0; j < V; ++j)
      S[d * V + j] *= decay[d];
    add_scaled(u, -k[d], S + d * V, V);
  }
  for (std::size_t j = 0; j < V; ++j)
    u[j] *= beta;
  if (decayed != nullptr) std::copy_n(S, K * V, decayed);
  for (std::size_t d = 0; d < K; ++d)
    add_scaled(S + d * V, k[d], u, V);
}

/// What a head's adjoint needs of every token of a segment: recomputed from the state at its start.
struct Segment {
  static constexpr std::int64_t kTokens = 32; // memory is T/32 + 2*32 states, not T
  Array decayed, after, u;                    ///< [32,K,V], [32,K,V], [32,V]
};

class HeadAdjoint {
public:
  HeadAdjoint(const Activated& a, const Inputs& in, const OutputGradients& given, Gradients& out,
              Array& d_gate)
      : a_(a), in_(in), given_(given), out_(out), d_gate_(d_gate),
        size_(a.key_dim * a.value_dim), segment_{Array(Segment::kTokens * size_),
                                                 Array(Segment::kTokens * size_),
                                                 Array(Segment::kTokens * a.value_dim)},
        du_(a.value_dim) {}

  void run(std::size_t n, std::size_t hv) {
    const Span span = a_.spans[n];
    const std::size_t at = a_.state(n, hv);
    Array S(size_, 0.0), dS(size_, 0.0), starts;
    if (!in_.initial_state.empty()) std::copy_n(&in_.initial_state[at], size_, S.begin());
    if (!given_.d_final_state.empty()) std::copy_n(&given_.d_final_state[at], size_, dS.begin());
    for (std::int64_t t = span.begin; t < span.end; ++t) {
      if ((t - span.begin) % Segment::kTokens == 0) starts.insert(starts.end(), S.begin(), S.end());
      step(a_, in_, t, hv, S.data(), du_.data());
    }
    const std::int64_t segments = (span.end - span.begin + Segment::kTokens - 1) / Segment::kTokens;
    for (std::int64_t s = segments - 1; s >= 0; --s) {
      const std::int64_t begin = span.begin + s * Segment::kTokens;
      const std::int64_t end = std::min(begin + Segment::kTokens, span.end);
      std::copy_n(&starts[static_cast<std::size_t>(s) * size_], size_, S.begin());
      recompute(begin, end, hv, S);
      for (std::int64_t t = end - 1; t >= begin; --t)
        token(t, static_cast<std::size_t>(t - begin), hv, dS);
    }
    std::copy(dS.begin(), dS.end(), out_.d_initial_state.begin() + static_cast<std::ptrdiff_t>(at));
  }

private:
  void recompute(std::int64_t begin, std::int64_t end, std::size_t hv, Array& S) {
    for (std::int64_t t = begin; t < end; ++t) {
      const auto i = static_cast<std::size_t>(t - begin);
      step(a_, in_, t, hv, S.data(), &segment_.u[i * a_.value_dim], &segment_.decayed[i * size_]);
      std::copy(S.begin(), S.end(), &segment_.after[i * size_]);
    }
  }

  /// dS enters as the gradient of the state after token t and leaves as that of the state before it.
  void token(std::int64_t t, std::size_t i, std::size_t hv, Array& dS) {
    const std::size_t K = a_.key_dim, V = a_.value_dim, row = a_.head_row(t, hv);
    const double* const q = &a_.q[a_.key_row(t, hv)];
    const double* const k = &a_.k[a_.key_row(t, hv)];
    const double* const d_o = &given_.d_o[row * V];
    const double* const u = &segment_.u[i * V];
    const double* const decayed = &segment_.decayed[i * size_];
    const double* const after = &segment_.after[i * size_];
    const double beta = a_.beta[row];
    double* const dq = &out_.d_q[a_.key_row(t, hv)];
    double* const dk = &out_.d_k[a_.key_row(t, hv)];

    std::fill(du_.begin(), du_.end(), 0.0);
    for (std::size_t d = 0; d < K; ++d) { // o = scale S^T q, S = S' + k u^T
      dq[d] += a_.scale * dot(after + d * V, d_o, V);
      add_scaled(&dS[d * V], a_.scale * q[d], d_o, V);
      dk[d] += dot(&dS[d * V], u, V);
      add_scaled(du_.data(), k[d], &dS[d * V], V);
    }
    // u = beta r, r = v - S'^T k
    double* const dv = &out_.d_v[row * V];
    const double* const v = &in_.v[row * V];
    Array residual(v, v + V);
    for (std::size_t d = 0; d < K; ++d)
      add_scaled(residual.data(), -k[d], decayed + d * V, V);
    out_.d_beta[row] = dot(du_.data(), residual.data(), V);
    for (std::size_t j = 0; j < V; ++j)
      dv[j] = beta * du_[j];
    for (std::size_t d = 0; d < K; ++d) { // through r, then S' = diag(e^g) S
      dk[d] -= dot(decayed + d * V, dv, V);
      add_scaled(&dS[d * V], -k[d], dv, V);
      d_gate_[row * K + d] = dot(&dS[d * V], decayed + d * V, V);
      const double decay = a_.decay[row * K + d];
      for (std::size_t j = 0; j < V; ++j)
        dS[d * V + j] *= decay;
    }
  }

  const Activated& a_;
  const Inputs& in_;
  const OutputGradients& given_;
  Gradients& out_;
  Array& d_gate_;
  std::size_t size_;
  Segment segment_;
  Array du_;
};

} // namespace

Outputs recurrence(const Inputs& in) {
  const Activated a = detail::activate(in);
  const std::size_t K = a.key_dim, V = a.value_dim;
  Outputs out{Array(a.rows * a.value_heads * V), Array(a.state(a.spans.size(), 0))};
  if (!in.initial_state.empty()) out.final_state = in.initial_state;
  Array u(V);
  for (std::size_t n = 0; n < a.spans.size(); ++n)
    for (std::size_t hv = 0; hv < a.value_heads; ++hv) {
      double* const S = out.final_state.data() + a.state(n, hv);
      for (std::int64_t t = a.spans[n].begin; t < a.spans[n].end; ++t) {
        step(a, in, t, hv, S, u.data());
        for (std::size_t d = 0; d < K; ++d)
          add_scaled(&out.o[a.head_row(t, hv) * V], a.scale * a.q[a.key_row(t, hv) + d], S + d * V, V);
      }
    }
  return out;
}

Gradients adjoint(const Inputs& in, const OutputGradients& given) {
  const Activated a = detail::activate(in);
  Gradients out;
  out.d_q.resize(in.q.size());
  out.d_k.resize(in.k.size());
  out.d_v.resize(in.v.size());
  out.d_beta.resize(in.beta.size());
  out.d_initial_state.resize(a.state(a.spans.size(), 0));
  Array d_gate(in.g.size());
  HeadAdjoint head(a, in, given, out, d_gate);
  for (std::size_t n = 0; n < a.spans.size(); ++n)
    for (std::size_t hv = 0; hv < a.value_heads; ++hv)
      head.run(n, hv); // d_q and d_k add up over the value heads of a group
  if (in.problem.qk_l2norm) {
    detail::l2norm_adjoint(in.q, a.key_dim, out.d_q);
    detail::l2norm_adjoint(in.k, a.key_dim, out.d_k);
  }
  detail::beta_adjoint(in, out.d_beta);
  Gradients through_gate = gate_adjoint(in, d_gate);
  out.d_g = std::move(through_gate.d_g);
  out.d_A_log = std::move(through_gate.d_A_log);
  out.d_dt_bias = std::move(through_gate.d_dt_bias);
  return out;
}

} // namespace kda::reference
