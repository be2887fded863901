// The host's gate kernels against the float64 reference.
#include "host_backend.h"
#include "pairwise.h"
#include "run_case.h"
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

using namespace kda;

namespace {

const Backend& backend() {
  static const std::shared_ptr<Backend> it = make_host_backend(2).value();
  return *it;
}

Variant variant_of(const Problem& p) {
  return choose(p, backend().target(), {}).value();
}

test::RunReport check_case(const test::CaseOptions& o, const test::RunOptions& options = {}) {
  const test::TestCase c = test::random_case(o);
  const Variant v = variant_of(o.problem);
  const auto report = test::run_case(backend(), c, v, options);
  if (!report) FAIL(report.error().message << "\n" << report.error().context);
  for (const test::TensorReport& t : report->tensors) {
    CAPTURE(t.name, t.place);
    CHECK(t.not_finite == 0);
    CHECK(t.error <= std::min(test::tolerance(o.problem, v, t.name), 2.5e-3));
  }
  return *report;
}

constexpr std::array kTypes{DType::bf16, DType::fp16, DType::fp32};
constexpr std::array kDims{16, 60, 128, 196, 256};

} // namespace

TEST_CASE("host gate: every two options together") {
  // K, type, gate, dt_bias, operation, strided, optional outputs, shape, regime
  const std::vector<int> sizes{5, 3, 5, 2, 2, 2, 2, 5, 4};
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(sizes)) {
    const auto at = [&](std::size_t i) { return static_cast<std::size_t>(row[i]); };
    test::CaseOptions o;
    Problem& p = o.problem;
    p.operation = row[4] == 0 ? Operation::gate : Operation::gate_backward;
    p.value_heads = 3;
    p.key_dim = kDims[at(0)];
    p.gate_dtype = kTypes[at(1)];
    p.gate = static_cast<GateKind>(row[2]);
    const bool precomputed = p.gate <= GateKind::log2;
    p.dt_bias = row[3] == 1 && !precomputed;
    o.batch = row[7] == 0 ? 3 : 1;
    o.tokens = row[7] == 1 ? 1 : row[7] == 4 ? 0 : 75;
    if (row[7] == 2 || row[7] == 3) {
      p.varlen = true;
      p.cu_seqlens_type = row[7] == 2 ? IndexType::int32 : IndexType::int64;
      o.lengths = {30, 0, 41};
      o.padding = row[7] == 2 ? 4 : 130; // in a block of tokens, and blocks of nothing else
    }
    // A relative error says nothing about the -inf that `gate` passes on.
    const bool spikes = precomputed && p.operation == Operation::gate_backward;
    o.regime = row[8] < 3 || spikes ? static_cast<test::Regime>(row[8]) : test::Regime::slow;
    o.seed = ++index;
    CAPTURE(to_string(p), row);
    check_case(o, {row[5] == 1, row[6] == 1});
  }
}

TEST_CASE("host gate: sums over many tokens keep their accuracy, with the same bits on any threads") {
  test::CaseOptions o;
  Problem& p = o.problem;
  p.operation = Operation::gate_backward;
  p.value_heads = 3;
  p.key_dim = 20;
  p.gate_dtype = DType::fp32;
  p.gate = GateKind::softplus;
  p.dt_bias = true;
  o.tokens = 5000;
  const test::RunReport report = check_case(o);
  REQUIRE(report.tensors.size() == 3);
  for (const test::TensorReport& t : report.tensors)
    CHECK(t.error <= 2e-6);
  const auto one = make_host_backend(1).value();
  const test::RunReport again = test::run_case(*one, test::random_case(o), variant_of(p)).value();
  for (std::size_t i = 0; i < report.tensors.size(); ++i)
    CHECK(again.tensors[i].error == report.tensors[i].error);
}

TEST_CASE("host gate: extreme inputs give no NaN, and finite derivatives") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::array<float, 16> in{kInfinity, -kInfinity, 3.4e38F, -3.4e38F, 100, -100, 1e-40F, 0,
                                 20,        20.5F,      -20,     -87,      88,  -88,  1e-8F,  -1e-8F};
  for (const Operation operation : {Operation::gate, Operation::gate_backward})
    for (int kind = 0; kind < 5; ++kind) {
      Problem p;
      p.operation = operation;
      p.gate = static_cast<GateKind>(kind);
      p.key_dim = 16;
      p.gate_dtype = DType::fp32;
      const SourceUnit unit = emit(p, variant_of(p), backend().target()).value();
      const auto module = backend().load(unit, backend().compile(unit).value()).value();
      std::array<float, 16> raw = in, dy{}, out{};
      dy.fill(1);
      const float a_log = 1;
      float d_a_log = 0;
      KernelArgs args{};
      args.g.data = raw.data();
      (operation == Operation::gate ? args.o : args.d_o).data =
          operation == Operation::gate ? out.data() : dy.data();
      args.d_g.data = out.data();
      args.A_log = &a_log;
      args.d_A_log = &d_a_log;
      args.tokens = args.batch = args.sequences = args.heads = args.value_heads = 1;
      args.lower_bound = -5;
      REQUIRE(module->launch({0, 1, 0, 0}, args, nullptr));
      for (std::size_t i = 0; i < out.size(); ++i) {
        CAPTURE(to_string(p), raw[i], out[i]);
        CHECK_FALSE(std::isnan(out[i]));
        if (operation == Operation::gate_backward) CHECK(std::isfinite(out[i]));
        if (operation == Operation::gate && kind > 1) CHECK(out[i] <= 0);
      }
      CHECK_FALSE(std::isnan(d_a_log));
      if (operation == Operation::gate && kind == 0) CHECK(out[1] == -kInfinity);
    }
}
