// Calls of a few tokens against one call of all of them, on the host.
#include "chained.h"
#include "host_backend.h"
#include <catch2/catch.hpp>

using namespace kda;

namespace {

const Backend& backend() {
  static const std::shared_ptr<Backend> it = make_host_backend(1).value();
  return *it;
}

} // namespace

TEST_CASE("host recurrence: chained calls and views of one buffer give the bits of one call") {
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k}) {
    const test::TestCase c = test::random_case(test::chained_case(layout));
    for (const Candidate& candidate : enumerate(c.inputs.problem, backend().target())) {
      if (!candidate.rejected.empty()) continue;
      CAPTURE(to_string(layout), to_string(candidate.variant));
      const test::Bits once = test::in_steps(backend(), c, candidate.variant, 16);
      CHECK(test::in_steps(backend(), c, candidate.variant, 1) == once);
      CHECK(test::in_steps(backend(), c, candidate.variant, 4) == once);
      CHECK(test::in_steps(backend(), c, candidate.variant, 4, test::Memory::packed) == once);
    }
  }
}

TEST_CASE("host recurrence: the state is within 1e-6 after one token and 1e-5 after 4,096") {
  test::CaseOptions o = test::chained_case(StateLayout::v_k);
  o.batch = 1;
  o.problem.key_dim = o.problem.value_dim = 128;
  o.regime = test::Regime::slow;
  for (const std::int64_t tokens : {1, 4096}) {
    o.tokens = tokens;
    const test::TestCase c = test::random_case(o);
    const Variant v = choose(o.problem, backend().target(), c.inputs.sizes).value();
    const auto report = test::run_case(backend(), c, v);
    REQUIRE(report);
    for (const test::TensorReport& t : report->tensors) {
      CAPTURE(tokens, t.name, t.place);
      if (t.name == "final_state") CHECK(t.error <= (tokens == 1 ? 1e-6 : 1e-5));
    }
    CHECK(report->tensors.size() == 2);
  }
}
