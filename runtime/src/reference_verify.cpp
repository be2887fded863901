// Verifying drafts in float64: every token starts from the state after its parent.
#include "reference_detail.h"
#include <algorithm>

namespace kda::reference {
namespace {

using detail::Activated;
using detail::add_scaled;

/// Token before token `i` of a sequence that begins at `begin`, counted in the sequence.
std::int64_t parent_of(const std::vector<std::int64_t>& parents, std::int64_t begin, std::int64_t i) {
  return parents.empty() ? i - 1 : parents[static_cast<std::size_t>(begin + i)]; // negative: none
}

/// S [K,V] <- diag(decay) S + k u^T.
void update(const Verified& x, std::size_t key_row, std::size_t head_row, std::size_t K, std::size_t V,
            double* S) {
  for (std::size_t d = 0; d < K; ++d) {
    for (std::size_t j = 0; j < V; ++j)
      S[d * V + j] *= x.decay[head_row * K + d];
    add_scaled(S + d * V, x.k[key_row + d], &x.u[head_row * V], V);
  }
}

} // namespace

Verified verify(const Inputs& in, const std::vector<std::int64_t>& parents) {
  const Activated a = detail::activate(in);
  const std::size_t K = a.key_dim, V = a.value_dim, size = K * V;
  Verified x{Array(a.rows * a.value_heads * V), Array(a.rows * a.value_heads * size),
             Array(a.rows * a.value_heads * V), a.k, a.decay};
  for (std::size_t n = 0; n < a.spans.size(); ++n)
    for (std::size_t hv = 0; hv < a.value_heads; ++hv)
      for (std::int64_t t = a.spans[n].begin; t < a.spans[n].end; ++t) {
        const std::int64_t begin = a.spans[n].begin, parent = parent_of(parents, begin, t - begin);
        const std::size_t row = a.head_row(t, hv), key_row = a.key_row(t, hv);
        double* const S = &x.states[row * size];
        if (parent >= 0)
          std::copy_n(&x.states[a.head_row(begin + parent, hv) * size], size, S);
        else if (!in.initial_state.empty())
          std::copy_n(&in.initial_state[a.state(n, hv)], size, S);
        double* const u = &x.u[row * V];
        std::copy_n(&in.v[row * V], V, u);
        for (std::size_t d = 0; d < K; ++d)
          add_scaled(u, -a.k[key_row + d] * a.decay[row * K + d], S + d * V, V);
        for (std::size_t j = 0; j < V; ++j)
          u[j] *= a.beta[row];
        update(x, key_row, row, K, V, S);
        for (std::size_t d = 0; d < K; ++d)
          add_scaled(&x.o[row * V], a.scale * a.q[key_row + d], S + d * V, V);
      }
  return x;
}

Array replay(const Inputs& in, const Verified& x, const std::vector<std::int64_t>& accepted,
             const std::vector<std::int64_t>& parents) {
  const auto H = static_cast<std::size_t>(in.problem.heads),
             HV = static_cast<std::size_t>(in.problem.value_heads),
             K = static_cast<std::size_t>(in.problem.key_dim),
             V = static_cast<std::size_t>(in.problem.value_dim);
  Array states = in.initial_state;
  states.resize(accepted.size() * HV * K * V);
  for (std::size_t n = 0; n < accepted.size(); ++n) {
    const std::int64_t begin =
        in.cu_seqlens.empty() ? static_cast<std::int64_t>(n) * in.sizes.tokens : in.cu_seqlens[n];
    std::vector<std::int64_t> path;
    for (std::int64_t i = accepted[n] - 1; i >= 0; i = parent_of(parents, begin, i))
      path.push_back(begin + i);
    for (std::size_t hv = 0; hv < HV; ++hv)
      for (auto t = path.rbegin(); t != path.rend(); ++t)
        update(x, (static_cast<std::size_t>(*t) * H + hv / (HV / H)) * K,
               static_cast<std::size_t>(*t) * HV + hv, K, V, &states[(n * HV + hv) * K * V]);
  }
  return states;
}

} // namespace kda::reference
