#pragma once
// Random KDA calls for the kernel tests: inputs in float64 that the problem's dtypes hold exactly, and what
// the float64 reference makes of them.
#include "kda/reference.h"
#include <string>

namespace kda::test {

/// How fast the state is forgotten; what the numerics of a chunk kernel depend on.
enum class Regime : std::uint8_t {
  fast,      ///< about -2.5 a token in every channel, -5 at most
  slow,      ///< -1e-4 to -0.05 a token in most channels, -1 to -5 in one of ten
  unbounded, ///< -1e-3 to -60 a token (a bounded gate stops at its bound)
  spikes,    ///< slow, with -1e4 and -inf here and there; for precomputed gates
};
[[nodiscard]] Result<Regime> parse_regime(std::string_view name);

struct CaseOptions {
  Problem problem;
  std::int64_t batch = 1, tokens = 70; ///< not packed
  std::vector<std::int64_t> lengths;   ///< packed: of the sequences, 0 allowed
  std::int64_t padding = 0;            ///< packed: tokens behind the last sequence
  Regime regime = Regime::fast;
  bool initial_state = true;
  bool mask = false; ///< every second sequence starts from zero, whatever its initial state holds
  std::int64_t interior_interval = 0; ///< of interior states, where the problem has them
  std::uint64_t seed = 1;
};

/// A tensor that a call writes: states in [K,V], gradients by the names of Args.
struct Expected {
  std::string name;
  reference::Array values;
};
struct TestCase {
  reference::Inputs inputs;                    ///< `problem` and `sizes` among them
  std::vector<std::int64_t> has_initial_state; ///< of a mask
  std::int64_t interior_interval = 0, interior_states = 0;
  std::vector<std::int64_t> interior_slots; ///< [N, columns]
  reference::OutputGradients gradients;
  reference::Array saved;  ///< Problem::saved_interval: the interior states, in [K,V], by slot
  reference::Array d_gate; ///< gate_backward: what comes in
  std::vector<Expected> expected;
};
[[nodiscard]] TestCase random_case(const CaseOptions& options);
/// The same problem with one-hot keys and small integers: every result is exact in fp32 and every operand of
/// a product in bf16. Then the order of sums and the rounding of a device do not matter, and a kernel that is
/// right gives float64 rounded once to the output's dtype, to the bit. For gate=log2 without l2norm and
/// sigmoid, a few tokens and K a power of 4.
[[nodiscard]] TestCase exact_case(const CaseOptions& options);

} // namespace kda::test
