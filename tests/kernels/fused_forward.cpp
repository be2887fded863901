// fused_forward.cu on the emulator against the float64 recurrence.
#include "checked.h"
#include "chunk_cases.h"
#include "kda/case_io.h"
#include "option_matrix.h"
#include "pairwise.h"
#include "run_case.h"
#include <cmath>
#include <random>

using namespace kda;
using test::chunk::rejection;
using test::chunk::variant;

namespace {

constexpr std::array kVariants{"fused c=16 vt=128 pw=7 sw=8 st=10"};
/// Sequences of the matrix have one segment or two.
constexpr std::array kMatrixVariants{"fused c=16 vt=128 pw=7 sw=8 st=10",
                                     "fused c=16 vt=128 pw=7 sw=8 st=10 seg=3"};

/// One order of threads, every access checked; the fused kernel is sm_90a's.
emulator::Options checked(std::uint64_t index) {
  emulator::Options options = test::checked(index);
  options.arch = "sm_90a";
  return options;
}

test::RunReport run(const test::TestCase& c, const Variant& v, test::RunOptions options = {},
                    const emulator::Options& order = {}) {
  const auto backend = emulator::make_backend(order);
  REQUIRE(backend);
  const auto report = test::run_case(**backend, c, v, options);
  if (!report) FAIL(report.error().message << "\n" << report.error().context);
  return *report;
}

void check_report(const test::RunReport& report, const Problem& p, const Variant& v) {
  for (const test::TensorReport& t : report.tensors) {
    CAPTURE(to_string(p), to_string(v), t.name, t.place);
    CHECK(t.not_finite == 0);
    CHECK(t.error <= test::tolerance(p, v, t.name));
  }
}

test::CaseOptions production(std::int64_t tokens) {
  test::CaseOptions o;
  o.problem.gate = GateKind::bounded;
  o.problem.dt_bias = o.problem.beta_sigmoid = o.problem.qk_l2norm = true;
  o.tokens = tokens;
  return o;
}

/// After a change of the inputs.
void expect_recurrence(test::TestCase& c) {
  const reference::Outputs expected = reference::recurrence(c.inputs);
  c.expected = {{"o", expected.o}, {"final_state", expected.final_state}};
}

} // namespace

TEST_CASE("fused forward: every two options together") {
  // As option_matrix.h, but for K, V and the dtypes of q, k, v and g.
  const std::vector<int> sizes{1,
                               1,
                               1,
                               3,
                               3,
                               2,
                               5,
                               2,
                               3,
                               2,
                               3,
                               test::chunk::shapes,
                               2,
                               2,
                               2,
                               4,
                               static_cast<int>(kMatrixVariants.size())};
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(sizes)) {
    test::CaseOptions o;
    test::chunk::set_dims(o, row);
    test::set_flags(o, row);
    Problem& p = o.problem;
    p.key_dim = p.value_dim = 128;
    p.dtype = p.gate_dtype = DType::bf16;
    o.seed = index + 1;
    const Variant v = variant(kMatrixVariants[static_cast<std::size_t>(row[16])]);
    check_report(run(test::random_case(o), v, test::run_of(row), checked(index++)), p, v);
  }
}

TEST_CASE("fused forward: golden cases") {
  int cases = 0;
  for (const auto& path : test::chunk::golden_files()) {
    const Case golden = read_case(path).value();
    test::TestCase c;
    c.inputs = reference_inputs(golden);
    Problem& p = c.inputs.problem;
    p.dtype = p.gate_dtype = p.beta_dtype = DType::bf16; // which hold the inputs exactly
    c.expected = {{"o", values(golden, "o")}, {"final_state", values(golden, "final_state")}};
    INFO(golden.name);
    for (const char* const text : kVariants)
      if (rejection(p, variant(text)).empty()) {
        check_report(run(c, variant(text)), p, variant(text));
        ++cases;
      }
  }
  if (cases == 0) WARN("SKIPPED: no golden file has K = V = 128");
}

TEST_CASE("fused forward: a long sequence goes round the ring in any order of threads") {
  test::CaseOptions o = production(0);
  o.problem.varlen = true;
  o.lengths = {15, 16, 17, 0, 31, 1, 700, 0, 160, 161};
  const test::TestCase c = test::random_case(o);
  for (const char* const text : kVariants)
    for (const std::uint64_t seed : {0, 1, 2, 3, 4, 5})
      for (const auto copies : {emulator::Copies::late, emulator::Copies::early}) {
        emulator::Options order;
        order.seed = seed;
        order.copies = copies;
        check_report(run(c, variant(text), {}, order), c.inputs.problem, variant(text));
      }
}

TEST_CASE("fused forward: no tokens leaves the initial state") {
  for (const test::TensorReport& t : run(test::random_case(production(0)), variant(kVariants[0])).tensors)
    CHECK(t.error == 0);
}

TEST_CASE("fused forward: every lower bound") {
  // Down to -5 a shorter way is taken.
  for (const double bound : {-1e-3, -5.0, -5.5, -100.0}) {
    test::CaseOptions o = production(70);
    o.regime = test::Regime::unbounded;
    test::TestCase c = test::random_case(o);
    c.inputs.lower_bound = bound;
    expect_recurrence(c);
    check_report(run(c, variant(kVariants[0])), o.problem, variant(kVariants[0]));
  }
}

TEST_CASE("fused forward: gates from 0 to -100 a token, values up to 3e4") {
  for (const GateKind gate : {GateKind::log_e, GateKind::bounded}) {
    test::CaseOptions o = production(100);
    o.problem.gate = gate;
    o.problem.dt_bias = false;
    test::TestCase c = test::random_case(o);
    c.inputs.lower_bound = -100;
    std::mt19937 random(7);
    const auto pick = [&](std::initializer_list<double> of) { return of.begin()[random() % of.size()]; };
    for (double& g : c.inputs.g)
      g = gate == GateKind::log_e ? pick({0, -1e-6, -0.01, -1, -20, -100}) : pick({-30, -9, -2, 0, 2, 30});
    for (double& v : c.inputs.v)
      v = pick({-29952, 1, 0, 29952});
    expect_recurrence(c);
    for (const char* const text : kVariants)
      check_report(run(c, variant(text)), o.problem, variant(text));
  }
}

TEST_CASE("fused forward: columns that leave fp16's range are scaled, the others keep their bits") {
  test::CaseOptions o = production(70);
  test::TestCase c = test::random_case(o);
  const test::RunReport before = run(c, variant(kVariants[0]));
  constexpr std::size_t columns = 128;
  for (std::size_t i = 0; i < c.inputs.v.size(); ++i) {
    if (i % columns == 5) c.inputs.v[i] = std::ldexp(c.inputs.v[i], 30);
    if (i % columns == 77) c.inputs.v[i] = std::ldexp(c.inputs.v[i], 90);
    if (i % columns == 120) c.inputs.v[i] = std::ldexp(c.inputs.v[i], 13);
  }
  for (std::size_t i = 0; i < c.inputs.initial_state.size(); ++i)
    if (i % columns == 77) c.inputs.initial_state[i] = std::ldexp(c.inputs.initial_state[i], 88);
  expect_recurrence(c);
  for (const std::uint64_t seed : {0, 1, 2}) {
    const test::RunReport after = run(c, variant(kVariants[0]), {}, checked(seed * 2));
    for (std::size_t t = 0; t < after.tensors.size(); ++t) {
      const reference::Array &x = after.tensors[t].values, &expected = c.expected[t].values;
      std::array<double, columns> error{}, size{};
      bool same = true;
      for (std::size_t i = 0; i < x.size(); ++i) {
        const std::size_t column = i % columns;
        error[column] += std::pow(x[i] - expected[i], 2);
        size[column] += std::pow(expected[i], 2);
        if (column != 5 && column != 77 && column != 120) same = same && x[i] == before.tensors[t].values[i];
      }
      CHECK(same);
      for (std::size_t column = 0; column < columns; ++column) {
        CAPTURE(seed, t, column);
        CHECK(std::sqrt(error[column] / size[column]) <= 5e-3);
      }
    }
  }
}

TEST_CASE("fused forward: correlated and identical keys, beta near 1, hardly any decay") {
  // (I + diag(beta) L)^-1 is then far from I.
  for (const double noise : {0.33, 0.0}) {
    test::CaseOptions o = production(130);
    o.problem.beta_sigmoid = false;
    o.regime = test::Regime::slow;
    test::TestCase c = test::random_case(o);
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    std::vector<double> direction(128);
    for (double& x : direction)
      x = normal(random);
    for (std::size_t i = 0; i < c.inputs.k.size(); ++i)
      c.inputs.k[i] =
          std::round((direction[i % 128] + noise * normal(random)) * 32) / 32; // exact in bf16 up to 8
    std::fill(c.inputs.beta.begin(), c.inputs.beta.end(), 0.984375);
    expect_recurrence(c);
    for (const char* const text : kVariants)
      for (const test::TensorReport& t : run(c, variant(text)).tensors) {
        CAPTURE(noise, text, t.name, t.place);
        CHECK(t.not_finite == 0);
        CHECK(t.error <= 1e-2);
      }
  }
}

TEST_CASE("fused forward: what it does not take is rejected with the reason") {
  const Variant v = variant(kVariants[0]);
  Problem p;
  CHECK(rejection(p, v).empty());
  CHECK_THAT(rejection(p, v, "sm_100a"), Catch::Contains("sm_90a has"));
  CHECK_THAT(rejection(p, v, "sm_90"), Catch::Contains("sm_90a has"));
  p.key_dim = 64;
  CHECK_THAT(rejection(p, v), Catch::Contains("not K=64 V=128"));
  p = {};
  p.gate_dtype = DType::fp32;
  CHECK_THAT(rejection(p, v), Catch::Contains("not bf16 and fp32"));
}
