// The host's recurrence against the float64 one.
#include "host_backend.h"
#include "pairwise.h"
#include "run_case.h"
#include <array>
#include <catch2/catch.hpp>

using namespace kda;

namespace {

const Backend& backend() {
  static const std::shared_ptr<Backend> it = make_host_backend(2).value();
  return *it;
}

std::vector<Variant> variants_of(const Problem& p) {
  std::vector<Variant> all;
  for (const Candidate& c : enumerate(p, backend().target()))
    if (c.rejected.empty()) all.push_back(c.variant);
  return all;
}

void check_case(const test::CaseOptions& options, const Variant& v, const test::RunOptions& run = {}) {
  const Problem& p = options.problem;
  CAPTURE(to_string(p), to_string(v), options.batch, options.tokens, options.lengths, options.padding,
          run.strided, run.optional_outputs, options.initial_state, static_cast<int>(options.regime));
  REQUIRE(validate(p));
  const test::TestCase c = test::random_case(options);
  const auto report = test::run_case(backend(), c, v, run);
  if (!report) FAIL(report.error().message << "\n" << report.error().context);
  CHECK(report->tensors.size() == (run.optional_outputs ? 2 : 1));
  for (const test::TensorReport& t : report->tensors) {
    CAPTURE(t.name, t.place);
    CHECK(t.not_finite == 0);
    CHECK(t.error <= test::tolerance(p, v, t.name));
  }
}

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

test::CaseOptions small_case() {
  test::CaseOptions o;
  o.problem.operation = Operation::recurrent;
  o.problem.key_dim = 44;
  o.problem.value_dim = 100;
  o.problem.dtype = o.problem.gate_dtype = o.problem.beta_dtype = DType::fp32;
  o.problem.gate = GateKind::softplus;
  o.problem.qk_l2norm = o.problem.beta_sigmoid = true;
  return o;
}

} // namespace

TEST_CASE("host recurrence: every two options together") {
  const std::vector<int> sizes{6, 3, 3, 3, 3, 2, 5, 2, 3, 2, 3, shapes, 2, 2, 2, 4, 6, 2};
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(sizes)) {
    const auto at = [&](std::size_t i) { return static_cast<std::size_t>(row[i]); };
    test::CaseOptions o;
    Problem& p = o.problem;
    p.operation = row[17] == 0 ? Operation::recurrent : Operation::forward;
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
    o.seed = ++index;
    const std::vector<Variant> variants = variants_of(p);
    check_case(o, variants[at(16) * variants.size() / 6], {row[13] == 1, row[14] == 1});
  }
}

TEST_CASE("host recurrence: every variant, a last slice that is not full, and every vector width") {
  const test::CaseOptions o = small_case();
  const test::TestCase c = test::random_case(o);
  for (const int bytes : {16, 32, 64}) {
    Target t = backend().target();
    t.vector_bytes = bytes;
    for (const Variant& v : variants_of(o.problem)) {
      CAPTURE(bytes, to_string(v));
      const auto report = test::run_unit(backend(), emit(o.problem, v, t).value(), c, v);
      REQUIRE(report);
      for (const test::TensorReport& x : report->tensors)
        CHECK(x.error <= test::tolerance(o.problem, v, x.name));
    }
  }
}

TEST_CASE("host recurrence: errors do not grow with the length") {
  test::CaseOptions o = small_case();
  o.tokens = 3000;
  for (const test::Regime regime : {test::Regime::slow, test::Regime::unbounded}) {
    o.regime = regime;
    check_case(o, variants_of(o.problem).front());
  }
}

TEST_CASE("host recurrence: the same bits on one thread and on many") {
  test::CaseOptions o = small_case();
  o.batch = 3;
  o.problem.heads = 2;
  o.problem.value_heads = 4;
  const test::TestCase c = test::random_case(o);
  const auto one = make_host_backend(1).value(), many = make_host_backend(4).value();
  for (const Variant& v : variants_of(o.problem)) {
    const test::RunReport a = test::run_case(*one, c, v).value(), b = test::run_case(*many, c, v).value();
    for (std::size_t i = 0; i < a.tensors.size(); ++i) {
      CHECK(a.tensors[i].error == b.tensors[i].error);
      CHECK(a.tensors[i].place == b.tensors[i].place);
    }
  }
}

TEST_CASE("host recurrence: a variant of another device is refused") {
  Variant v;
  v.algorithm = Algorithm::chunk;
  const auto unit = emit(small_case().problem, v, backend().target());
  REQUIRE_FALSE(unit);
  CHECK(unit.error().code == ErrorCode::invalid_argument);
}
