// The host's recurrence against the float64 one.
#include "host_backend.h"
#include "option_matrix.h"
#include "pairwise.h"
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
  std::vector<int> sizes = test::kOptionSizes;
  sizes.push_back(2); // recurrent or forward
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(sizes)) {
    const Operation operation = row[17] == 0 ? Operation::recurrent : Operation::forward;
    const test::CaseOptions o = test::case_of(row, operation, ++index);
    check_case(o, test::variant_of(row, variants_of(o.problem)), test::run_of(row));
  }
}

TEST_CASE("host recurrence: every variant, a last slice that is not full, and every vector width") {
  test::CaseOptions o = small_case();
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k})
    for (const int dim : {44, 128}) { // 128: whole vectors of a state that is not copied
      o.problem.state_layout = layout;
      o.problem.key_dim = dim;
      const test::TestCase c = test::random_case(o);
      for (const int bytes : {16, 32, 64}) {
        Target t = backend().target();
        t.vector_bytes = bytes;
        for (const Variant& v : variants_of(o.problem)) {
          CAPTURE(to_string(layout), dim, bytes, to_string(v));
          const auto report = test::run_unit(backend(), emit(o.problem, v, t).value(), c, v);
          REQUIRE(report);
          for (const test::TensorReport& x : report->tensors)
            CHECK(x.error <= test::tolerance(o.problem, v, x.name));
        }
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

TEST_CASE("host recurrence: interior states and a mask of initial states") {
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k})
    for (const DType state : {DType::fp32, DType::bf16})
      for (const bool strided : {false, true}) {
        test::CaseOptions o = small_case();
        Problem& p = o.problem;
        p.operation = Operation::forward;
        p.interior_states = p.varlen = true;
        p.state_layout = layout;
        p.state_dtype = state;
        o.lengths = {63, 64, 0, 65, 200, 1};
        o.padding = 3;
        o.mask = true;
        o.interior_interval = 64;
        const test::TestCase c = test::random_case(o);
        REQUIRE(c.interior_states > 1);
        for (const Variant& v : variants_of(p)) {
          CAPTURE(to_string(p), to_string(v), strided);
          const auto report = test::run_case(backend(), c, v, {strided, true});
          if (!report) FAIL(report.error().message << "\n" << report.error().context);
          CHECK(report->tensors.size() == 3);
          for (const test::TensorReport& t : report->tensors) {
            CAPTURE(t.name, t.place);
            CHECK(t.not_finite == 0);
            CHECK(t.error <= test::tolerance(p, v, t.name));
          }
        }
      }
}
