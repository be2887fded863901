// chunk_backward.cu on the emulator against the float64 adjoint.
#include "checked.h"
#include "chunk_cases.h"
#include "kda/case_io.h"
#include "option_matrix.h"
#include "pairwise.h"
#include "run_case.h"

using namespace kda;
using test::chunk::variant;

namespace {

void check_case(const test::TestCase& c, const Variant& v, test::RunOptions run = {},
                const emulator::Options& order = {}) {
  const Problem& p = c.inputs.problem;
  CAPTURE(to_string(p), to_string(v), run.strided, run.optional_outputs);
  const auto backend = emulator::make_backend(order);
  REQUIRE(backend);
  const auto report = test::run_case(**backend, c, v, run);
  if (!report) FAIL(report.error().message << "\n" << report.error().context);
  CHECK(report->tensors.size() >= 5);
  for (const test::TensorReport& t : report->tensors) {
    CAPTURE(t.name, t.place);
    CHECK(t.not_finite == 0);
    CHECK(t.error <= test::tolerance(p, v, t.name));
  }
}

test::CaseOptions backward_case(int key_dim, int value_dim, std::int64_t tokens, test::Regime regime) {
  test::CaseOptions o;
  Problem& p = o.problem;
  p.operation = Operation::backward;
  p.key_dim = key_dim;
  p.value_dim = value_dim;
  p.gate = regime == test::Regime::unbounded ? GateKind::softplus : GateKind::bounded;
  p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true;
  o.tokens = tokens;
  o.regime = regime;
  return o;
}

constexpr std::array kVariants{"chunk c=64 vt=32 pw=8 sw=4 st=2", "chunk c=32 vt=32 pw=8 sw=4 st=3",
                               "chunk c=16 vt=16 pw=4 sw=8 st=2", "chunk c=32 vt=16 pw=4 sw=4 st=2"};

} // namespace

TEST_CASE("chunk backward: every two options together") {
  std::uint64_t index = 0;
  for (const std::vector<int>& row : test::pairwise(test::chunk::kOptionSizes)) {
    test::CaseOptions o;
    Problem& p = o.problem;
    p.operation = Operation::backward;
    test::chunk::set_dims(o, row);
    test::set_flags(o, row);
    o.seed = index + 1;
    check_case(test::random_case(o), variant(kVariants[static_cast<std::size_t>(row[16])]), test::run_of(row),
               test::checked(index));
    ++index;
  }
}

TEST_CASE("chunk backward: every regime at K = V = 128, in several orders of threads") {
  for (const test::Regime regime : {test::Regime::fast, test::Regime::slow, test::Regime::unbounded})
    for (const std::uint64_t seed : {0, 2}) {
      emulator::Options order;
      order.seed = seed;
      check_case(test::random_case(backward_case(128, 128, 150, regime)),
                 variant("chunk c=64 vt=64 pw=8 sw=4 st=2"), {}, order);
      check_case(test::random_case(backward_case(128, 128, 70, regime)),
                 variant("chunk c=32 vt=64 pw=8 sw=8 st=2"), {}, order);
    }
}

TEST_CASE("chunk backward: golden cases") {
  for (const auto& path : test::chunk::golden_files()) {
    const Case golden = read_case(path).value();
    test::TestCase c;
    c.inputs = reference_inputs(golden);
    c.gradients = reference_output_gradients(golden);
    Problem& p = c.inputs.problem;
    p.operation = Operation::backward;
    p.dtype = p.gate_dtype = p.beta_dtype = DType::bf16; // which hold the inputs exactly
    for (const auto& [ours, theirs] : {std::pair{"d_q", "dq"},
                                       {"d_k", "dk"},
                                       {"d_v", "dv"},
                                       {"d_g", "dg"},
                                       {"d_beta", "dbeta"},
                                       {"d_initial_state", "dinitial_state"},
                                       {"d_A_log", "dA_log"},
                                       {"d_dt_bias", "ddt_bias"}})
      if (std::vector<double> x = values(golden, theirs); !x.empty())
        c.expected.push_back({ours, std::move(x)});
    INFO(golden.name);
    for (const Variant& v :
         test::chunk::golden_variants(golden.name, p,
                                      {"chunk c=64 vt=32 pw=8 sw=4 st=2", "chunk c=32 vt=32 pw=8 sw=4 st=2",
                                       "chunk c=16 vt=16 pw=8 sw=4 st=2"}))
      check_case(c, v);
  }
}
