// chunk_forward.cu on the emulator against the float64 recurrence.
#include "checked.h"
#include "chunk_cases.h"
#include "kda/case_io.h"
#include "option_matrix.h"
#include "pairwise.h"
#include "run_case.h"
#include <random>

using namespace kda;
using test::chunk::rejection;
using test::chunk::variant;

namespace {

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

test::CaseOptions forward_case(int key_dim, int value_dim, std::int64_t tokens) {
  test::CaseOptions o;
  o.problem.key_dim = key_dim;
  o.problem.value_dim = value_dim;
  o.problem.qk_l2norm = true;
  o.tokens = tokens;
  return o;
}

constexpr std::array kVariants{"chunk c=64 vt=64 pw=4 sw=4 st=2", "chunk c=32 vt=32 pw=8 sw=4 st=3",
                               "chunk c=16 vt=16 pw=4 sw=8 st=4", "chunk c=64 vt=32 pw=8 sw=4 st=2"};

} // namespace

TEST_CASE("chunk forward: every two options together") {
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(test::chunk::kOptionSizes)) {
    test::CaseOptions o;
    Problem& p = o.problem;
    test::chunk::set_dims(o, row);
    test::set_flags(o, row);
    o.seed = index + 1;
    const Variant v = variant(kVariants[static_cast<std::size_t>(row[16])]);
    check_report(run(test::random_case(o), v, test::run_of(row), test::checked(index++)), p, v);
  }
}

TEST_CASE("chunk forward: golden cases") {
  for (const auto& path : test::chunk::golden_files()) {
    const Case golden = read_case(path).value();
    test::TestCase c;
    c.inputs = reference_inputs(golden);
    Problem& p = c.inputs.problem;
    p.dtype = p.gate_dtype = p.beta_dtype = DType::bf16; // which hold the inputs exactly
    c.expected = {{"o", values(golden, "o")}, {"final_state", values(golden, "final_state")}};
    INFO(golden.name);
    for (const Variant& v : test::chunk::golden_variants(
             golden.name, p, {"chunk c=64 vt=64 pw=8 sw=4 st=2", "chunk c=32 vt=32 pw=8 sw=4 st=2"}))
      check_report(run(c, v), p, v);
  }
}

TEST_CASE("chunk forward: correlated keys, beta near 1, hardly any decay") {
  // (I + diag(beta) L)^-1 is then far from I; an inverse in fp16 or tf32 is off by a third.
  for (const double noise : {0.5, 0.0}) {
    test::CaseOptions o = forward_case(64, 64, 130);
    o.regime = test::Regime::slow;
    test::TestCase c = test::random_case(o);
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    std::vector<double> direction(64);
    for (double& x : direction)
      x = normal(random);
    for (std::size_t i = 0; i < c.inputs.k.size(); ++i)
      c.inputs.k[i] = direction[i % 64] + noise * normal(random);
    std::fill(c.inputs.beta.begin(), c.inputs.beta.end(), 0.984375);
    for (double& x : c.inputs.k)
      x = std::round(x * 64) / 64; // exact in bf16 up to 4
    const reference::Outputs expected = reference::recurrence(c.inputs);
    c.expected = {{"o", expected.o}, {"final_state", expected.final_state}};
    for (const test::TensorReport& t : run(c, variant("chunk c=64 vt=64 pw=4 sw=4 st=2")).tensors) {
      CAPTURE(noise, t.name, t.place);
      CHECK(t.not_finite == 0);
      CHECK(t.error <= 2e-2);
    }
  }
}

TEST_CASE("chunk forward: lengths around tiles and chunks, in any order of threads") {
  test::CaseOptions o = forward_case(32, 32, 0);
  o.problem.varlen = true;
  o.lengths = {15, 16, 17, 0, 31, 32, 33, 1, 63, 64, 65, 0, 129};
  o.problem.gate = GateKind::log_e;
  const test::TestCase c = test::random_case(o);
  const Variant v = variant("chunk c=32 vt=32 pw=4 sw=4 st=2");
  for (const std::uint64_t seed : {0, 1, 2, 3, 4, 5})
    for (const auto copies : {emulator::Copies::late, emulator::Copies::early}) {
      emulator::Options order;
      order.seed = seed;
      order.copies = copies;
      check_report(run(c, v, {}, order), c.inputs.problem, v);
    }
}

TEST_CASE("chunk forward: more sequences than the schedule has threads") {
  test::CaseOptions o = forward_case(16, 16, 0);
  o.problem.varlen = true;
  for (int i = 0; i < 600; ++i)
    o.lengths.push_back(i % 5 == 3 ? 0 : i % 7 == 1 ? 18 : 2);
  const test::TestCase c = test::random_case(o);
  const Variant v = variant("chunk c=16 vt=16 pw=4 sw=4 st=2");
  check_report(run(c, v), c.inputs.problem, v);
}

TEST_CASE("chunk forward: no tokens leaves the initial state") {
  const test::TestCase c = test::random_case(forward_case(32, 32, 0));
  const Variant v = variant("chunk c=64 vt=32 pw=4 sw=4 st=2");
  const test::RunReport report = run(c, v);
  CHECK(report.launches == 1);
  for (const test::TensorReport& t : report.tensors)
    CHECK(t.error == 0);
}

TEST_CASE("chunk forward: what does not fit is rejected with a reason") {
  Problem p;
  CHECK(rejection(p, variant("chunk c=64 vt=64 pw=4 sw=4 st=2")).empty());
  CHECK_THAT(rejection(p, variant("chunk c=64 vt=128 pw=4 sw=4 st=2")), Catch::Contains("need 8 warps"));
  CHECK_THAT(rejection(p, variant("chunk c=64 vt=64 pw=4 sw=4 st=4")), Catch::Contains("shared memory"));
  p.value_dim = 36;
  CHECK_THAT(rejection(p, variant("chunk c=64 vt=64 pw=4 sw=4 st=2")), Catch::Contains("wider than V=36"));
  p.key_dim = 256;
  CHECK_THAT(rejection(p, variant("chunk c=64 vt=32 pw=8 sw=4 st=2")), Catch::Contains("registers"));
  CHECK_THAT(rejection(p, variant("chunk c=64 vt=32 pw=4 sw=4 st=2")), Catch::Contains("do not cover K=256"));
  p.dtype = DType::fp32;
  CHECK_THAT(rejection(p, variant("chunk c=16 vt=16 pw=4 sw=4 st=2")), Catch::Contains("16 bits"));
}

TEST_CASE("chunk forward: every architecture has a variant for K = V = 128") {
  const Problem p;
  for (const char* arch : {"sm_80", "sm_86", "sm_90a", "sm_100a", "sm_120a"}) {
    int fitting = 0;
    for (const Candidate& c : enumerate(p, cuda_target(arch).value()))
      fitting += c.variant.algorithm == Algorithm::chunk && c.rejected.empty();
    CAPTURE(arch);
    CHECK(fitting >= 8);
  }
}
