// The chunk form in float64 (kda-reference 1.4). Decays between two tokens are products of decays, never
// differences of cumulative logarithms: a gate of -inf gives 0, not inf - inf.
#include "reference_detail.h"
#include <algorithm>

namespace kda::reference {
namespace {

using detail::Activated;
using detail::add_scaled;
using detail::dot;

/// One chunk of one value head: rows t0 .. t0+C-1.
struct Chunk {
  std::size_t C = 0;
  Array L, M; ///< [C,C]: L_ij = beta_i k_i.(decay i<-j) k_j, j < i; M_ij = scale q_i.(decay) k_j, j <= i
  Array from_start;    ///< [C,K] decay from the chunk's start up to and with row i, E(G_i)
  Array to_end;        ///< [C,K] decay after row i up to the chunk's end, E(G_n - G_i)
  Array inverse, W, U; ///< (I + L)^-1 [C,C]; inverse (beta k E(G)) [C,K]; inverse (beta v) [C,V]
};

/// Pair products. The running factor of row i is the product of the decays of rows j+1 .. i.
void pairs(const Activated& a, std::int64_t t0, std::size_t hv, Chunk& c) {
  const std::size_t K = a.key_dim;
  Array factor(K), row(K);
  for (std::size_t i = 0; i < c.C; ++i) {
    const std::int64_t ti = t0 + static_cast<std::int64_t>(i);
    std::fill(factor.begin(), factor.end(), 1.0);
    for (std::size_t j = i + 1; j-- > 0;) {
      const std::int64_t tj = t0 + static_cast<std::int64_t>(j);
      const double* const kj = &a.k[a.key_row(tj, hv)];
      const double* const decay_j = &a.decay[a.head_row(tj, hv) * K];
      for (std::size_t d = 0; d < K; ++d)
        row[d] = factor[d] * kj[d];
      c.M[i * c.C + j] = a.scale * dot(&a.q[a.key_row(ti, hv)], row.data(), K);
      if (j < i) c.L[i * c.C + j] = a.beta[a.head_row(ti, hv)] * dot(&a.k[a.key_row(ti, hv)], row.data(), K);
      for (std::size_t d = 0; d < K; ++d)
        factor[d] *= decay_j[d];
    }
    std::copy(factor.begin(), factor.end(), &c.from_start[i * K]);
  }
  std::fill(factor.begin(), factor.end(), 1.0);
  for (std::size_t i = c.C; i-- > 0;) {
    std::copy(factor.begin(), factor.end(), &c.to_end[i * K]);
    const double* const decay = &a.decay[a.head_row(t0 + static_cast<std::int64_t>(i), hv) * K];
    for (std::size_t d = 0; d < K; ++d)
      factor[d] *= decay[d];
  }
}

/// Unit lower triangular inverse by forward substitution, then W and U.
void solve(const Activated& a, const Inputs& in, std::int64_t t0, std::size_t hv, Chunk& c) {
  const std::size_t C = c.C, K = a.key_dim, V = a.value_dim;
  for (std::size_t i = 0; i < C; ++i) {
    c.inverse[i * C + i] = 1;
    for (std::size_t j = 0; j < i; ++j)
      add_scaled(&c.inverse[i * C], -c.L[i * C + j], &c.inverse[j * C], C);
  }
  for (std::size_t i = 0; i < C; ++i)
    for (std::size_t j = 0; j <= i; ++j) {
      const std::int64_t tj = t0 + static_cast<std::int64_t>(j);
      const double x = c.inverse[i * C + j] * a.beta[a.head_row(tj, hv)];
      for (std::size_t d = 0; d < K; ++d)
        c.W[i * K + d] += x * a.k[a.key_row(tj, hv) + d] * c.from_start[j * K + d];
      add_scaled(&c.U[i * V], x, &in.v[a.head_row(tj, hv) * V], V);
    }
}

/// o of the chunk, and the state S [K,V] from the chunk's start to its end.
void scan(const Activated& a, std::int64_t t0, std::size_t hv, Chunk& c, double* S, Array& o) {
  const std::size_t C = c.C, K = a.key_dim, V = a.value_dim;
  for (std::size_t i = 0; i < C; ++i) // U becomes v_new = U - W S
    for (std::size_t d = 0; d < K; ++d)
      add_scaled(&c.U[i * V], -c.W[i * K + d], S + d * V, V);
  for (std::size_t i = 0; i < C; ++i) {
    const std::int64_t t = t0 + static_cast<std::int64_t>(i);
    double* const row = &o[a.head_row(t, hv) * V];
    for (std::size_t d = 0; d < K; ++d)
      add_scaled(row, a.scale * a.q[a.key_row(t, hv) + d] * c.from_start[i * K + d], S + d * V, V);
    for (std::size_t j = 0; j <= i; ++j)
      add_scaled(row, c.M[i * C + j], &c.U[j * V], V);
  }
  for (std::size_t d = 0; d < K; ++d) {
    for (std::size_t v = 0; v < V; ++v)
      S[d * V + v] *= c.from_start[(C - 1) * K + d];
    for (std::size_t i = 0; i < C; ++i) {
      const double k = a.k[a.key_row(t0 + static_cast<std::int64_t>(i), hv) + d];
      add_scaled(S + d * V, k * c.to_end[i * K + d], &c.U[i * V], V);
    }
  }
}

} // namespace

Outputs chunked(const Inputs& in, int chunk) {
  const Activated a = detail::activate(in);
  const std::size_t K = a.key_dim, V = a.value_dim;
  Outputs out{Array(a.rows * a.value_heads * V), Array(a.state(a.spans.size(), 0))};
  if (!in.initial_state.empty()) out.final_state = in.initial_state;
  for (std::size_t n = 0; n < a.spans.size(); ++n)
    for (std::size_t hv = 0; hv < a.value_heads; ++hv)
      for (std::int64_t t0 = a.spans[n].begin; t0 < a.spans[n].end; t0 += chunk) {
        const auto C = static_cast<std::size_t>(std::min<std::int64_t>(chunk, a.spans[n].end - t0));
        Chunk c{
            C,           Array(C * C), Array(C * C), Array(C * K), Array(C * K), Array(C * C), Array(C * K),
            Array(C * V)};
        pairs(a, t0, hv, c);
        solve(a, in, t0, hv, c);
        scan(a, t0, hv, c, out.final_state.data() + a.state(n, hv), out.o);
      }
  return out;
}

} // namespace kda::reference
