// Calls of a few tokens against one call of all of them, on the host.
#include "chained.h"
#include "decode.h"
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

TEST_CASE("host recurrence: the state is right to 1e-6 after one token and to 1e-5 after 4,096") {
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k})
    CHECK(test::run_long_decode(backend(), layout, 128, parse_variant("token r=128").value()) == "");
}
