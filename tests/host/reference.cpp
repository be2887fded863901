// What the host has no kernel for runs as the float64 reference: tensors in and out, and that it says so.
#include "codegen/reference_unit.h"
#include "host_backend.h"
#include "pairwise.h"
#include "run_case.h"
#include <array>
#include <catch2/catch.hpp>
#include <cmath>

using namespace kda;

namespace {

const Backend& backend() {
  static const std::shared_ptr<Backend> it = make_host_backend(2).value();
  return *it;
}

constexpr std::array kTypes{DType::bf16, DType::fp16, DType::fp32};

/// One rounding to the tensor's dtype is all that may differ: at most half a unit in the last place.
double tolerance(const Problem& p, const std::string& tensor) {
  const bool fp32 = tensor == "d_A_log" || tensor == "d_dt_bias";
  DType type = fp32 ? DType::fp32 : p.dtype;
  if (tensor == "d_g") type = p.gate_dtype;
  if (tensor == "d_beta") type = p.beta_dtype;
  if (tensor == "d_initial_state") type = p.state_dtype;
  return std::ldexp(1.0, type == DType::fp32 ? -24 : type == DType::fp16 ? -11 : -8);
}

} // namespace

TEST_CASE("host reference: every tensor finds its place") {
  // dtype, gate, beta, state dtype, layout, gate kind, heads, packed, strided, optional, initial
  const std::vector<int> sizes{3, 3, 3, 3, 2, 5, 2, 3, 2, 2, 2};
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(sizes)) {
    const auto at = [&](std::size_t i) { return static_cast<std::size_t>(row[i]); };
    test::CaseOptions o;
    Problem& p = o.problem;
    p.operation = Operation::backward;
    p.dtype = kTypes[at(0)];
    p.gate_dtype = kTypes[at(1)];
    p.beta_dtype = kTypes[at(2)];
    p.state_dtype = kTypes[at(3)];
    p.state_layout = row[4] == 0 ? StateLayout::k_v : StateLayout::v_k;
    p.gate = static_cast<GateKind>(row[5]);
    p.dt_bias = p.gate > GateKind::log2;
    p.beta_sigmoid = p.qk_l2norm = row[5] % 2 == 0;
    p.key_dim = 20;
    p.value_dim = 36;
    p.heads = 1 + row[6];
    p.value_heads = 2 * p.heads;
    o.batch = 2;
    o.tokens = 9;
    if (row[7] != 0) {
      p.varlen = true;
      p.cu_seqlens_type = row[7] == 1 ? IndexType::int32 : IndexType::int64;
      o.lengths = {4, 0, 7};
      o.padding = 3;
    }
    o.initial_state = row[10] == 1;
    o.regime = test::Regime::slow;
    o.seed = ++index;
    CAPTURE(to_string(p), row);
    const test::TestCase c = test::random_case(o);
    const Variant v = choose(p, backend().target(), c.inputs.sizes).value();
    const auto report = test::run_case(backend(), c, v, {row[8] == 1, row[9] == 1});
    if (!report) FAIL(report.error().message);
    CHECK_FALSE(report->tensors.empty());
    for (const test::TensorReport& t : report->tensors) {
      CAPTURE(t.name, t.place);
      CHECK(t.error <= tolerance(p, t.name));
    }
  }
}

TEST_CASE("host reference: the image says what it is, and a unit keeps its problem") {
  Problem p;
  p.operation = Operation::backward;
  p.heads = 3;
  p.value_heads = 6;
  p.gate = GateKind::softplus;
  p.state_layout = StateLayout::v_k;
  SourceUnit unit = emit(p, {}, backend().target()).value();
  CHECK(unit.main.empty());
  CHECK(unit.entries == std::vector<std::string>{"float64 reference"});
  CHECK(reference_problem(unit) == p);
  Image image = backend().compile(unit).value();
  CHECK(image.log.find("float64 reference") != std::string::npos);
  REQUIRE(backend().load(unit, image));
  image.bytes = "something else";
  const auto refused = backend().load(unit, image);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::load_failed);
  unit.options.pop_back();
  CHECK_FALSE(reference_problem(unit));
}

TEST_CASE("host reference: a malformed cu_seqlens is refused before anything is read through it") {
  Problem p;
  p.operation = Operation::backward;
  p.varlen = true;
  p.gate = GateKind::log_e;
  const SourceUnit unit = emit(p, {}, backend().target()).value();
  const auto module = backend().load(unit, backend().compile(unit).value()).value();
  KernelArgs args{};
  args.tokens = 4;
  args.batch = 1;
  args.sequences = 2;
  for (const std::array<std::int64_t, 3>& cu : {std::array<std::int64_t, 3>{0, 3, 2}, {1, 2, 3}, {0, 2, 5}}) {
    args.cu_seqlens = cu.data();
    const Status status = module->launch({0, 1, 0, 0}, args, nullptr);
    REQUIRE_FALSE(status);
    CHECK(status.error().code == ErrorCode::invalid_argument);
  }
}
