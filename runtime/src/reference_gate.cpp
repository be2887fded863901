// Gate, beta and l2norm in float64 with their adjoints (kda-reference 1.2 and 1.3).
#include "reference_detail.h"
#include <cmath>
#include <limits>
#include <numbers>

namespace kda::reference {
namespace {

double sigmoid(double x) {
  return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x));
}
/// s(x) (1 - s(x)) without the cancellation of 1 - s.
double sigmoid_derivative(double x) {
  const double e = std::exp(-std::abs(x));
  return e / ((1 + e) * (1 + e));
}
double softplus(double x) {
  constexpr double threshold = 20; // x itself above it, as PyTorch and fla
  return x > threshold ? x : std::log1p(std::exp(x));
}
/// x * y with 0 * inf = 0: a derivative that has vanished wins over an argument that is infinite.
double product(double x, double y) {
  return x == 0 || y == 0 ? 0 : x * y;
}

/// Natural-log decay and its derivatives with respect to g and A_log.
struct GateValue {
  double value, d_raw, d_a_log;
};
GateValue gate_value(const Inputs& in, double raw, double bias, double a) {
  const double x = raw + bias;
  switch (in.problem.gate) {
  case GateKind::log_e: return {raw, 1, 0};
  case GateKind::log2: return {raw * std::numbers::ln2, std::numbers::ln2, 0};
  case GateKind::softplus: {
    const double y = -a * softplus(x);
    return {y, -a * sigmoid(x), y};
  }
  case GateKind::bounded: {
    const double d = in.lower_bound * sigmoid_derivative(a * x);
    return {in.lower_bound * sigmoid(a * x), d * a, product(d, a * x)};
  }
  case GateKind::bounded_no_a: break;
  }
  return {in.lower_bound * sigmoid(x), in.lower_bound * sigmoid_derivative(x), 0};
}

/// Calls visit(index of [B*T,HV,K], hv, index of [HV,K], value) for every gate; padding behind packed tokens
/// is not visited.
template <class Visit>
void for_each_gate(const Inputs& in, Visit visit) {
  const auto value_heads = static_cast<std::size_t>(in.problem.value_heads);
  const auto per_head = static_cast<std::size_t>(in.problem.key_dim);
  const std::size_t row = value_heads * per_head;
  Array a(value_heads, 1.0);
  if (reads_a_log(in.problem.gate))
    for (std::size_t hv = 0; hv < value_heads; ++hv)
      a[hv] = std::exp(in.A_log[hv]);
  const std::size_t end =
      in.cu_seqlens.empty() ? in.g.size() : static_cast<std::size_t>(in.cu_seqlens.back()) * row;
  for (std::size_t i = 0; i < end; ++i) {
    const std::size_t channel = i % row, hv = channel / per_head;
    const double bias = in.problem.dt_bias ? in.dt_bias[channel] : 0;
    visit(i, hv, channel, gate_value(in, in.g[i], bias, a[hv]));
  }
}

Array normalised(const Array& x, std::size_t dim) {
  Array y = x;
  for (std::size_t row = 0; row + dim <= x.size(); row += dim) {
    const double r = 1 / std::sqrt(detail::dot(&x[row], &x[row], dim) + 1e-6);
    for (std::size_t i = row; i < row + dim; ++i)
      y[i] *= r;
  }
  return y;
}

} // namespace

Array gate(const Inputs& in) {
  Array out(in.g.size());
  for_each_gate(in, [&](std::size_t i, std::size_t, std::size_t, const GateValue& y) { out[i] = y.value; });
  return out;
}

Gradients gate_adjoint(const Inputs& in, const Array& d_gate) {
  Gradients out;
  const auto value_heads = static_cast<std::size_t>(in.problem.value_heads);
  out.d_g.resize(in.g.size());
  if (reads_a_log(in.problem.gate)) out.d_A_log.resize(value_heads);
  if (in.problem.dt_bias) out.d_dt_bias.resize(value_heads * static_cast<std::size_t>(in.problem.key_dim));
  for_each_gate(in, [&](std::size_t i, std::size_t hv, std::size_t channel, const GateValue& y) {
    out.d_g[i] = d_gate[i] * y.d_raw;
    if (!out.d_A_log.empty()) out.d_A_log[hv] += product(d_gate[i], y.d_a_log);
    if (!out.d_dt_bias.empty()) out.d_dt_bias[channel] += out.d_g[i];
  });
  return out;
}

double relative_error(const Array& a, const Array& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!std::isfinite(a[i]) || !std::isfinite(b[i])) return std::numeric_limits<double>::infinity();
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

namespace detail {

Activated activate(const Inputs& in) {
  const Problem& p = in.problem;
  Activated a;
  a.rows = static_cast<std::size_t>(in.sizes.batch * in.sizes.tokens);
  a.heads = static_cast<std::size_t>(p.heads);
  a.value_heads = static_cast<std::size_t>(p.value_heads);
  a.key_dim = static_cast<std::size_t>(p.key_dim);
  a.value_dim = static_cast<std::size_t>(p.value_dim);
  a.group = a.value_heads / a.heads;
  a.scale = in.scale == 0 ? 1 / std::sqrt(static_cast<double>(p.key_dim)) : in.scale;
  if (in.cu_seqlens.empty())
    for (std::int64_t b = 0; b < in.sizes.batch; ++b)
      a.spans.push_back({b * in.sizes.tokens, (b + 1) * in.sizes.tokens});
  for (std::size_t n = 0; n + 1 < in.cu_seqlens.size(); ++n)
    a.spans.push_back({in.cu_seqlens[n], in.cu_seqlens[n + 1]});
  a.q = p.qk_l2norm ? normalised(in.q, a.key_dim) : in.q;
  a.k = p.qk_l2norm ? normalised(in.k, a.key_dim) : in.k;
  a.decay = gate(in);
  for (double& g : a.decay)
    g = std::exp(g); // 0 for -inf: everything after works with the factor, so that inf - inf cannot arise
  a.beta = in.beta;
  if (p.beta_sigmoid)
    for (double& x : a.beta)
      x = (p.beta_times_two ? 2 : 1) * sigmoid(x);
  return a;
}

void l2norm_adjoint(const Array& x, std::size_t dim, Array& dy) {
  for (std::size_t row = 0; row + dim <= x.size(); row += dim) {
    const double r = 1 / std::sqrt(dot(&x[row], &x[row], dim) + 1e-6);
    const double along = r * r * dot(&x[row], &dy[row], dim);
    for (std::size_t i = row; i < row + dim; ++i)
      dy[i] = r * (dy[i] - x[i] * along);
  }
}

void beta_adjoint(const Inputs& in, Array& d_beta) {
  if (!in.problem.beta_sigmoid) return;
  for (std::size_t i = 0; i < d_beta.size(); ++i)
    d_beta[i] *= (in.problem.beta_times_two ? 2 : 1) * sigmoid_derivative(in.beta[i]);
}

} // namespace detail
} // namespace kda::reference
