// Calls of a few tokens against one call of all of them, recurrent.cu on the emulator.
#include "chained.h"
#include "emulator.h"
#include <catch2/catch.hpp>

using namespace kda;

TEST_CASE("recurrent kernel: chained calls and views of one buffer give the bits of one call") {
  const auto backend = emulator::make_backend().value();
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k}) {
    const test::TestCase c = test::random_case(test::chained_case(layout));
    // The warps of a CTA share nothing: one number of warps, every number of rows and stages.
    int warps = 0;
    for (const Candidate& candidate : enumerate(c.inputs.problem, backend->target())) {
      const Variant& v = candidate.variant;
      if (!candidate.rejected.empty() || (warps != 0 && v.scan_warps != warps)) continue;
      warps = v.scan_warps;
      CAPTURE(to_string(layout), to_string(v));
      const test::Bits once = test::in_steps(*backend, c, v, 16);
      CHECK(test::in_steps(*backend, c, v, 1) == once);
      CHECK(test::in_steps(*backend, c, v, 4) == once);
      CHECK(test::in_steps(*backend, c, v, 4, test::Memory::packed) == once);
    }
    CHECK(warps > 0);
  }
}
