// recurrent_backward.cu on the emulator against the float64 adjoint.
#include "checked.h"
#include "option_matrix.h"
#include "pairwise.h"
#include <catch2/catch.hpp>
#include <cmath>

using namespace kda;

namespace {

Target h100() {
  return cuda_target("sm_90a").value();
}

std::vector<Variant> accepted(const Problem& p) {
  std::vector<Variant> all;
  for (const Candidate& c : enumerate(p, h100()))
    if (c.rejected.empty() && c.variant.algorithm == Algorithm::token) all.push_back(c.variant);
  return all;
}

/// What fp32 arithmetic and one rounding of the result leave: half a unit in the last place is 2^-8 of a bf16
/// value just above a power of two, and a case of one token has one beta.
double tolerance(DType type) {
  switch (type) {
  case DType::bf16: return 4e-3;
  case DType::fp16: return 5e-4;
  case DType::fp32: break;
  }
  return 5e-6;
}

DType dtype_of(const Problem& p, const std::string& name) {
  if (name == "d_g") return p.gate_dtype;
  if (name == "d_beta") return p.beta_dtype;
  if (name == "d_initial_state") return p.state_dtype;
  return name == "d_A_log" || name == "d_dt_bias" ? DType::fp32 : p.dtype;
}

void check_case(const test::CaseOptions& options, const Variant& v, const test::RunOptions& run,
                const emulator::Options& order = {}) {
  const Problem& p = options.problem;
  CAPTURE(to_string(p), to_string(v), options.batch, options.tokens, options.lengths, options.padding,
          run.strided, run.optional_outputs, options.initial_state, static_cast<int>(options.regime));
  REQUIRE(validate(p));
  const test::TestCase c = test::random_case(options);
  const auto backend = emulator::make_backend(order);
  REQUIRE(backend);
  const auto report = test::run_case(**backend, c, v, run);
  if (!report) FAIL(report.error().message << "\n" << report.error().context);
  if (options.tokens > 0 || !options.lengths.empty()) CHECK(report->tensors.size() >= 5);
  for (const test::TensorReport& t : report->tensors) {
    CAPTURE(t.name, t.place);
    CHECK(t.not_finite == 0);
    // Sums over every token and channel cancel: their rounding is relative to the terms, not to the sum.
    const bool parameter = t.name == "d_A_log" || t.name == "d_dt_bias";
    CHECK(t.error <= (parameter ? 1e-4 : tolerance(dtype_of(p, t.name))));
  }
}

} // namespace

TEST_CASE("token backward: every two options together") {
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(test::kOptionSizes)) {
    const test::CaseOptions o = test::case_of(row, Operation::backward, index);
    check_case(o, test::variant_of(row, accepted(o.problem)), test::run_of(row), test::checked(index));
    ++index;
  }
}

TEST_CASE("token backward: every variant, in every gate regime, more tokens than a segment") {
  for (const test::Regime regime : {test::Regime::fast, test::Regime::slow, test::Regime::unbounded}) {
    test::CaseOptions o;
    Problem& p = o.problem;
    p.operation = Operation::backward;
    p.key_dim = p.value_dim = 64;
    p.gate = regime == test::Regime::unbounded ? GateKind::softplus : GateKind::bounded;
    p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true;
    o.tokens = 70;
    o.regime = regime;
    for (const Variant& v : accepted(p))
      check_case(o, v, {});
  }
}
