// recurrent_backward.cu on the emulator against the float64 adjoint.
#include "emulator.h"
#include "pairwise.h"
#include "run_case.h"
#include <array>
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
    if (c.rejected.empty()) all.push_back(c.variant);
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
                std::uint64_t thread_order = 0) {
  const Problem& p = options.problem;
  CAPTURE(to_string(p), to_string(v), options.batch, options.tokens, options.lengths, options.padding,
          run.strided, run.optional_outputs, options.initial_state, static_cast<int>(options.regime));
  REQUIRE(validate(p));
  const test::TestCase c = test::random_case(options);
  emulator::Options order;
  order.seed = thread_order;
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

// One array an option; pairwise rows index them.
constexpr std::array<std::array<int, 2>, 6> kDims{
    {{128, 128}, {60, 100}, {100, 60}, {16, 256}, {196, 16}, {32, 36}}};
constexpr std::array kTypes{DType::bf16, DType::fp16, DType::fp32};
constexpr std::array kGates{GateKind::log_e, GateKind::log2, GateKind::softplus, GateKind::bounded,
                            GateKind::bounded_no_a};
constexpr std::array kRegimes{test::Regime::fast, test::Regime::slow, test::Regime::unbounded,
                              test::Regime::spikes};
constexpr std::array<std::array<int, 2>, 3> kHeads{{{1, 1}, {1, 3}, {2, 4}}};
enum Shape { fixed, one_token, no_token, packed_int32, packed_int64, shapes };

void set_shape(test::CaseOptions& o, Shape shape) {
  switch (shape) {
  case fixed:
    o.batch = 2;
    o.tokens = 11;
    return;
  case one_token:
    o.batch = 3;
    o.tokens = 1;
    return;
  case no_token: o.tokens = 0; return;
  default: break;
  }
  o.problem.varlen = true;
  o.problem.cu_seqlens_type = shape == packed_int32 ? IndexType::int32 : IndexType::int64;
  o.lengths = {0, 9, 1, 0, 4};
  o.padding = shape == packed_int32 ? 5 : 0;
}

} // namespace

TEST_CASE("token backward: every two options together") {
  const std::vector<int> sizes{6, 3, 3, 3, 3, 2, 5, 2, 3, 2, 3, shapes, 2, 2, 2, 4, 6};
  int index = 0;
  for (const std::vector<int>& row : test::pairwise(sizes)) {
    const auto at = [&](std::size_t i) { return static_cast<std::size_t>(row[i]); };
    test::CaseOptions o;
    Problem& p = o.problem;
    p.operation = Operation::backward;
    p.key_dim = kDims[at(0)][0];
    p.value_dim = kDims[at(0)][1];
    p.dtype = kTypes[at(1)];
    p.gate_dtype = kTypes[at(2)];
    p.beta_dtype = kTypes[at(3)];
    p.state_dtype = kTypes[at(4)];
    p.state_layout = row[5] == 0 ? StateLayout::k_v : StateLayout::v_k;
    p.gate = kGates[at(6)];
    const bool precomputed = p.gate == GateKind::log_e || p.gate == GateKind::log2;
    p.dt_bias = row[7] == 1 && !precomputed;
    p.beta_sigmoid = row[8] > 0;
    p.beta_times_two = row[8] > 1;
    p.qk_l2norm = row[9] == 1;
    p.heads = kHeads[at(10)][0];
    p.value_heads = kHeads[at(10)][1];
    set_shape(o, static_cast<Shape>(row[11]));
    o.initial_state = row[12] == 1;
    o.regime = precomputed || row[15] < 3 ? kRegimes[at(15)] : test::Regime::fast;
    o.seed = static_cast<std::uint64_t>(index);
    const std::vector<Variant> variants = accepted(p);
    check_case(o, variants[at(16) * variants.size() / 6], {row[13] == 1, row[14] == 1},
               static_cast<std::uint64_t>(index++ % 3));
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
