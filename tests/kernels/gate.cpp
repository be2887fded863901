// gate.cu and stages/gate.cuh on the emulator against float64.
#include "checked.h"
#include "pairwise.h"
#include "run_case.h"
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

using namespace kda;

namespace {

constexpr std::array kDims{128, 60, 256, 16, 100};
constexpr std::array kTypes{DType::bf16, DType::fp16, DType::fp32};
constexpr std::array kGates{GateKind::log_e, GateKind::log2, GateKind::softplus, GateKind::bounded,
                            GateKind::bounded_no_a};
constexpr double kFp32 = 1e-6;

test::RunReport run(const test::TestCase& c, const Variant& v, test::RunOptions options = {},
                    const emulator::Options& order = {}) {
  const auto backend = emulator::make_backend(order).value();
  const auto report = test::run_case(*backend, c, v, options);
  if (!report) FAIL(report.error().message << "\n" << report.error().context);
  return *report;
}

std::vector<Variant> variants_of(const Problem& p) {
  std::vector<Variant> all;
  for (const Candidate& c : enumerate(p, cuda_target("sm_90a").value()))
    all.push_back(c.variant);
  return all;
}

test::CaseOptions gate_case(Operation operation, GateKind gate, DType type, int key_dim) {
  test::CaseOptions o;
  o.problem.operation = operation;
  o.problem.gate = gate;
  o.problem.key_dim = key_dim;
  o.problem.value_dim = 16;
  o.problem.heads = 1;
  o.problem.value_heads = 3;
  o.problem.gate_dtype = type;
  return o;
}

/// What one rounding of d_g leaves; everything else is fp32.
double tolerance(const std::string& tensor, DType type) {
  if (tensor != "d_g" || type == DType::fp32) return kFp32;
  return type == DType::bf16 ? 2.5e-3 : 3e-4;
}

} // namespace

TEST_CASE("gate kernels: every two options together") {
  // K, type, gate, dt_bias, operation, strided, optional outputs, shape, regime, variant
  const std::vector<int> sizes{5, 3, 5, 2, 2, 2, 2, 3, 4, 4};
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(sizes)) {
    const auto at = [&](std::size_t i) { return static_cast<std::size_t>(row[i]); };
    const Operation operation = row[4] == 0 ? Operation::gate : Operation::gate_backward;
    test::CaseOptions o = gate_case(operation, kGates[at(2)], kTypes[at(1)], kDims[at(0)]);
    const bool precomputed = row[2] < 2;
    o.problem.dt_bias = row[3] == 1 && !precomputed;
    o.batch = row[7] == 0 ? 3 : 1;
    o.tokens = row[7] == 1 ? 1 : 75;
    if (row[7] == 2) {
      o.problem.varlen = true;
      o.lengths = {30, 0, 41};
      o.padding = 4;
    }
    // A relative error says nothing about the -inf that `gate` passes on; that is checked below.
    const bool spikes = precomputed && operation == Operation::gate_backward;
    o.regime = row[8] < 3 || spikes ? static_cast<test::Regime>(row[8]) : test::Regime::slow;
    o.seed = ++index;
    CAPTURE(to_string(o.problem), row);
    const test::RunOptions options{row[5] == 1, row[6] == 1};
    for (const test::TensorReport& t :
         run(test::random_case(o), variants_of(o.problem)[at(9)], options, test::checked(index)).tensors) {
      CAPTURE(t.name, t.place);
      CHECK(t.not_finite == 0);
      CHECK(t.error <= tolerance(t.name, o.problem.gate_dtype));
    }
  }
}

TEST_CASE("gate kernels: parameter gradients have the same bits in any order of execution") {
  test::CaseOptions o = gate_case(Operation::gate_backward, GateKind::softplus, DType::fp32, 60);
  o.problem.dt_bias = true;
  o.tokens = 700;
  const test::TestCase c = test::random_case(o);
  const Variant v = variants_of(o.problem).back();
  const test::RunReport first = run(c, v);
  REQUIRE(first.tensors.size() == 3);
  for (const std::uint64_t order : {1, 7, 8}) {
    const test::RunReport again = run(c, v, {}, emulator::Options{"sm_90a", order});
    for (std::size_t i = 0; i < first.tensors.size(); ++i) {
      CHECK(again.tensors[i].name == first.tensors[i].name);
      CHECK(again.tensors[i].error == first.tensors[i].error);
    }
  }
}

TEST_CASE("gate kernels: no tokens give parameter gradients of zero") {
  test::CaseOptions o = gate_case(Operation::gate_backward, GateKind::bounded, DType::bf16, 32);
  o.problem.dt_bias = true;
  o.tokens = 0;
  const test::RunReport report = run(test::random_case(o), variants_of(o.problem).front());
  for (const test::TensorReport& t : report.tensors) {
    CAPTURE(t.name);
    CHECK(t.error == 0);
  }
}

namespace {

constexpr const char* kProbe = R"(
#include "kernel_args.cuh"
#include "stages/gate.cuh"
KDA_KERNEL(32, 1) probe(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  const float* in = static_cast<const float*>(args.g.data);
  float* out = static_cast<float*>(args.o.data);
  for (i64 i = lane_index(); i < args.tokens; i += 32) {
    const GateDerivative d = gate_derivative(in[i], 0.25f, 3.f, -5.f);
    float* row = out + 6 * i;
    row[0] = gate_log2(in[i], 0.25f, 3.f, -5.f);
    row[1] = gate_natural(in[i], 0.25f, 3.f, -5.f);
    row[2] = d.raw;
    row[3] = d.a_log;
    row[4] = beta_value(in[i]);
    row[5] = beta_derivative(in[i]);
  }
}
)";

/// The six results of the probe for each input.
std::vector<std::array<float, 6>> probe(GateKind gate, const std::vector<float>& in) {
  Problem p;
  p.operation = Operation::gate;
  p.gate = gate;
  p.dt_bias = gate != GateKind::log_e && gate != GateKind::log2;
  p.beta_sigmoid = p.beta_times_two = true;
  const auto backend = emulator::make_backend().value();
  SourceUnit unit = emit(p, variants_of(p).front(), backend->target()).value();
  unit.name = "probe.cu";
  unit.main = kProbe;
  unit.entries = {"probe"};
  const auto image = backend->compile(unit);
  if (!image) FAIL(image.error().context);
  const auto module = backend->load(unit, *image).value();
  std::vector<std::array<float, 6>> out(in.size());
  KernelArgs args{};
  args.tokens = static_cast<long long>(in.size());
  args.g.data = backend->allocate(in.size() * sizeof(float)).value();
  args.o.data = backend->allocate(out.size() * sizeof(out[0])).value();
  REQUIRE(backend->copy_to_device(args.g.data, in.data(), in.size() * sizeof(float)));
  REQUIRE(module->launch({0, 1, 32, 0}, args, nullptr));
  REQUIRE(backend->copy_from_device(out.data(), args.o.data, out.size() * sizeof(out[0])));
  backend->release(args.g.data);
  backend->release(args.o.data);
  return out;
}

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

} // namespace

TEST_CASE("gate functions are accurate to 1e-6 of the value") {
  std::vector<float> in;
  for (float x = -25; x < 25; x += 0.0625F)
    in.push_back(x);
  const double log2e = 1 / std::log(2.0);
  for (const GateKind gate : {GateKind::softplus, GateKind::bounded}) {
    const auto out = probe(gate, in);
    for (std::size_t i = 0; i < in.size(); ++i) {
      const double x = in[i] + 0.25, s = sigmoid(3 * x), slope = s * sigmoid(-3 * x);
      const bool softplus = gate == GateKind::softplus;
      const double g = softplus ? -3 * std::log1p(std::exp(x)) : -5 * s;
      const double raw = softplus ? -3 * sigmoid(x) : -5 * 3 * slope;
      const double a_log = softplus ? g : raw * x;
      const double beta = 2 * sigmoid(in[i]), beta_slope = beta * sigmoid(-in[i]);
      const std::array<double, 6> expected{g * log2e, g, raw, a_log, beta, beta_slope};
      for (std::size_t n = 0; n < 6; ++n) {
        CAPTURE(to_string(gate), in[i], n);
        CHECK(std::abs(out[i][n] - expected[n]) <= 1e-6 * std::abs(expected[n]));
      }
    }
  }
}

TEST_CASE("gate functions never give NaN, and derivatives are finite") {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> in{infinity, -infinity, 3.4e38F, -3.4e38F, 100, -100, 1e-40F, 0};
  for (const GateKind gate : kGates) {
    const auto out = probe(gate, in);
    if (gate == GateKind::log_e || gate == GateKind::log2) CHECK(out[1][1] == -infinity);
    for (std::size_t i = 0; i < in.size(); ++i) {
      CAPTURE(to_string(gate), in[i]);
      CHECK_FALSE(std::isnan(out[i][0]));
      CHECK_FALSE(std::isnan(out[i][1]));
      for (std::size_t n = 2; n < 6; ++n)
        CHECK(std::isfinite(out[i][n]));
      if (gate > GateKind::log2) CHECK(out[i][0] <= 0);
    }
  }
}
