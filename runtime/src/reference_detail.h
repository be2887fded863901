#pragma once
// What the token recurrence, the chunk form and the adjoint share: activated inputs and sequence bounds.
#include "kda/reference.h"

namespace kda::reference::detail {

/// Rows [begin, end) of the flattened [B*T] token axis: sequence n.
struct Span {
  std::int64_t begin, end;
};

/// The inputs as the recurrence reads them: normalised q and k [B*T,H,K], decay e^g [B*T,HV,K] and
/// activated beta [B*T,HV]. Rows that no sequence covers are prepared too and never read.
struct Activated {
  std::size_t rows, heads, value_heads, key_dim, value_dim, group; ///< group: HV/H
  double scale;
  std::vector<Span> spans;
  Array q, k, decay, beta;

  [[nodiscard]] std::size_t key_row(std::int64_t t, std::size_t hv) const { ///< of q and k
    return (static_cast<std::size_t>(t) * heads + hv / group) * key_dim;
  }
  [[nodiscard]] std::size_t head_row(std::int64_t t,
                                     std::size_t hv) const { ///< of beta; times a dim: of v, g
    return static_cast<std::size_t>(t) * value_heads + hv;
  }
  [[nodiscard]] std::size_t state(std::size_t n, std::size_t hv) const { ///< of [N,HV,K,V]
    return (n * value_heads + hv) * key_dim * value_dim;
  }
};
[[nodiscard]] Activated activate(const Inputs&);

/// Gradient with respect to x of y = x * rsqrt(sum x^2 + 1e-6), in place in dy, row by row of `dim`.
void l2norm_adjoint(const Array& x, std::size_t dim, Array& dy);
/// Gradient of the activated beta turned, in place, into that of beta as given.
void beta_adjoint(const Inputs&, Array& d_beta);

[[nodiscard]] inline double dot(const double* a, const double* b, std::size_t n) {
  double sum[4] = {0, 0, 0, 0};
  std::size_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (std::size_t j = 0; j < 4; ++j)
      sum[j] += a[i + j] * b[i + j];
  for (; i < n; ++i)
    sum[0] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
/// y += a * x
inline void add_scaled(double* y, double a, const double* x, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i)
    y[i] += a * x[i];
}

} // namespace kda::reference::detail
