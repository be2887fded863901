// The harness of the kernel tests: right kernels pass it in every mode, and faults planted in them do not.
#include "emulator.h"
#include "run_case.h"
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

using namespace kda;
using Catch::Matchers::Contains;

namespace {

test::CaseOptions gate_backward() {
  test::CaseOptions o;
  o.problem.operation = Operation::gate_backward;
  o.problem.gate = GateKind::bounded;
  o.problem.key_dim = o.problem.value_dim = 32;
  o.problem.dt_bias = true;
  return o;
}
const Variant kGate = parse_variant("gate sw=4 r=8").value();
const Variant kToken = parse_variant("token sw=1 r=16 st=1").value();

std::shared_ptr<Backend> emulated(std::uint64_t seed = 0) {
  emulator::Options options;
  options.seed = seed;
  return emulator::make_backend(options).value();
}

/// The kernel with one piece of its text replaced.
SourceUnit changed(const Problem& p, const Variant& v, const std::string& from, const std::string& to) {
  SourceUnit unit = emit(p, v, cuda_target("sm_90a").value()).value();
  std::string* text = &unit.main; // the piece may stand in a stage that the kernel includes
  for (SourceFile& f : unit.files)
    if (f.text.find(from) != std::string::npos) text = &f.text;
  const std::size_t at = text->find(from);
  REQUIRE(at != std::string::npos);
  text->replace(at, from.size(), to);
  return unit;
}

bool passes(const test::RunReport& report, const test::CaseOptions& o, const Variant& v) {
  for (const test::TensorReport& t : report.tensors)
    if (!(t.error <= test::tolerance(o.problem, v, t.name))) return false;
  return true;
}

} // namespace

TEST_CASE("a right kernel passes contiguous and strided, with and without optional outputs") {
  test::CaseOptions o;
  o.problem.operation = Operation::recurrent;
  o.problem.key_dim = 32;
  o.problem.value_dim = 64;
  o.problem.value_heads = 2;
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k})
    for (const test::RunOptions options : {test::RunOptions{false, true}, {true, true}, {true, false}}) {
      o.problem.state_layout = layout;
      const auto report = test::run_case(*emulated(), test::random_case(o), kToken, options);
      REQUIRE(report);
      CHECK(report->tensors.size() == (options.optional_outputs ? 2 : 1));
      CHECK(passes(*report, o, kToken));
    }
}

TEST_CASE("the regimes and the gates give the decays that they name") {
  for (const GateKind gate :
       {GateKind::log_e, GateKind::log2, GateKind::softplus, GateKind::bounded, GateKind::bounded_no_a})
    for (const test::Regime regime : {test::Regime::fast, test::Regime::slow, test::Regime::unbounded}) {
      test::CaseOptions o = gate_backward();
      o.problem.gate = gate;
      o.problem.dt_bias = gate != GateKind::log_e && gate != GateKind::log2;
      o.problem.gate_dtype = DType::fp32;
      o.regime = regime;
      const reference::Array decays = reference::gate(test::random_case(o).inputs);
      double mean = 0, lowest = 0;
      for (const double g : decays) {
        CHECK((std::isfinite(g) && g <= 0));
        mean += g / static_cast<double>(decays.size());
        lowest = std::min(lowest, g);
      }
      if (regime == test::Regime::fast) CHECK(mean == Approx(-2.5).margin(0.2));
      if (regime == test::Regime::slow) CHECK(mean == Approx(-0.3).margin(0.1));
      if (regime == test::Regime::unbounded) CHECK(lowest < (is_bounded(gate) ? -4.5 : -50));
    }
}

TEST_CASE("values that a case gives are those that the dtypes hold") {
  test::CaseOptions o;
  o.problem.dtype = DType::fp16;
  for (const double x : test::random_case(o).inputs.v)
    CHECK(x == std::ldexp(std::nearbyint(std::ldexp(x, 24)), -24));
}

TEST_CASE("a missing barrier in a kernel shows in some order of threads") {
  const test::CaseOptions o = gate_backward();
  const test::TestCase c = test::random_case(o);
  const SourceUnit unit = changed(o.problem, kGate, "sync_block();", "");
  int wrong = 0;
  for (const std::uint64_t seed : {0, 1, 2, 3}) {
    CHECK(passes(test::run_case(*emulated(seed), c, kGate).value(), o, kGate));
    wrong += passes(test::run_unit(*emulated(seed), unit, c, kGate).value(), o, kGate) ? 0 : 1;
  }
  CHECK(wrong > 0);
}

TEST_CASE("an output that is not written, a written input and a written gap are found") {
  const test::CaseOptions o = gate_backward();
  const test::TestCase c = test::random_case(o);
  const std::string store =
      "store_row(row_of<Gate>(args.d_g, tile.batch, token, tile.value_head), tile.lane, d);";
  const auto run = [&](const std::string& instead) {
    return test::run_unit(*emulated(), changed(o.problem, kGate, store, instead), c, kGate, {true, true});
  };
  CHECK(run("").value().tensors.at(0).not_finite == 70 * 32);
  const auto input = run(store + "static_cast<float*>(args.d_o.data)[0] = 1.f;");
  REQUIRE_FALSE(input);
  CHECK_THAT(input.error().message, Contains("the input d_o was written"));
  const auto gap =
      run(store +
          "row_of<Gate>(args.d_g, tile.batch, token, tile.value_head)[Config::K] = from_float<Gate>(0.f);");
  REQUIRE_FALSE(gap);
  CHECK_THAT(gap.error().message, Contains("a gap between the rows of d_g"));
}

TEST_CASE("an unknown regime is refused with the names there are") {
  CHECK(test::parse_regime("spikes").value() == test::Regime::spikes);
  CHECK_THAT(test::parse_regime("brisk").error().message, Contains("fast, slow, unbounded or spikes"));
}
