#pragma once
// Seeded problems of any size for the reference's own tests.
#include "kda/reference.h"

namespace kda::reference {

struct Shape {
  int heads = 1, value_heads = 2, key_dim = 12, value_dim = 10;
  std::int64_t batch = 1, tokens = 9;
  std::vector<std::int64_t> cu_seqlens; ///< empty: not packed
};

/// Every optional tensor present; l2norm and sigmoid on. Precomputed gates are in [-2, 0].
[[nodiscard]] Inputs random_inputs(const Shape&, GateKind, unsigned seed);
[[nodiscard]] OutputGradients random_output_gradients(const Inputs&, unsigned seed);

} // namespace kda::reference
