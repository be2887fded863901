// States within the sequences and a mask of initial states, on the emulator against the float64 recurrence:
// every form of the forward.
#include "checked.h"
#include "chunk_cases.h"
#include "run_case.h"

using namespace kda;
using test::chunk::variant;

namespace {

void check(const test::CaseOptions& o, const char* text, std::uint64_t seed) {
  const test::TestCase c = test::random_case(o);
  REQUIRE(c.interior_states > 1);
  emulator::Options options = test::checked(0);
  options.seed = seed;
  options.optimize = 0; // most of the time is the compiler's
  const auto backend = emulator::make_backend(options).value();
  for (const bool strided : {false, true}) {
    const auto report = test::run_case(*backend, c, variant(text), {strided, true});
    if (!report) FAIL(report.error().message << "\n" << report.error().context);
    CHECK(report->tensors.size() == 3);
    for (const test::TensorReport& t : report->tensors) {
      CAPTURE(to_string(o.problem), text, t.name, t.place);
      CHECK(t.not_finite == 0);
      CHECK(t.error <= test::tolerance(o.problem, variant(text), t.name));
    }
  }
}

test::CaseOptions packed(int key_dim, int value_dim, StateLayout layout) {
  test::CaseOptions o;
  o.problem.interior_states = o.problem.varlen = o.problem.qk_l2norm = true;
  o.problem.value_heads = 2;
  o.problem.key_dim = key_dim;
  o.problem.value_dim = value_dim;
  o.problem.state_layout = layout;
  o.problem.gate = GateKind::log_e;
  o.regime = test::Regime::slow;
  o.lengths = {63, 64, 0, 65, 200, 1};
  o.padding = 3;
  o.mask = true;
  o.interior_interval = 64;
  return o;
}

} // namespace

TEST_CASE("interior states: two kernels") {
  check(packed(64, 32, StateLayout::v_k), "chunk c=64 vt=32 pw=4 sw=4 st=2", 0);
  test::CaseOptions o = packed(60, 36, StateLayout::k_v);
  o.problem.state_dtype = DType::bf16;
  check(o, "chunk c=16 vt=16 pw=4 sw=4 st=2", 1);
  o.problem.varlen = false;
  o.batch = 3;
  o.tokens = 260;
  o.interior_interval = 128;
  check(o, "chunk c=32 vt=32 pw=4 sw=4 st=2", 2);
}

TEST_CASE("interior states: fused, whole and in segments") {
  check(packed(128, 128, StateLayout::v_k), "fused c=16 vt=128 pw=7 sw=8 st=10", 0);
  check(packed(128, 128, StateLayout::k_v), "fused c=16 vt=128 pw=7 sw=8 st=10 seg=3", 1);
}

TEST_CASE("interior states: token by token") {
  test::CaseOptions o = packed(64, 32, StateLayout::v_k);
  check(o, "token sw=4 r=8 st=1", 0);
  o.problem.state_layout = StateLayout::k_v;
  check(o, "token sw=4 r=8 st=3", 1);
}
