// Slabs of the chunk backward: what they cost in memory and launches, and when they are chosen.
#include "codegen/source_unit.h"
#include <algorithm>
#include <catch2/catch.hpp>

using namespace kda;

namespace {

const Target kTarget = cuda_target("sm_90a").value();
constexpr std::size_t kLimit = 350'000'000;

Problem production(int heads, int value_heads, bool varlen, int saved_interval) {
  Problem p;
  p.operation = Operation::backward;
  p.heads = heads;
  p.value_heads = value_heads;
  p.gate = GateKind::bounded;
  p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true;
  p.varlen = varlen;
  p.saved_interval = saved_interval;
  return p;
}

} // namespace

TEST_CASE("8,192 tokens of 32 heads fit 0.35 GB, with what the forward saves") {
  for (const int heads : {32, 8})
    for (const bool varlen : {false, true})
      for (const int interval : {0, 512, 1024}) {
        const Problem p = production(heads, 32, varlen, interval);
        const Sizes sizes{1, 8192, varlen ? 8 : 1};
        const auto saved = static_cast<std::size_t>(saved_states(p, sizes, interval).value().bytes);
        const Variant v = choose(p, kTarget, sizes, kLimit - saved).value();
        INFO(to_string(p) << ": " << to_string(v));
        CHECK(v.slab > 0);
        CHECK(workspace_layout(p, v, sizes).bytes + saved <= kLimit);
      }
}

TEST_CASE("without a limit no slabs are chosen, and a limit that none keeps says what would") {
  for (const bool varlen : {false, true}) {
    const Problem p = production(32, 32, varlen, 0);
    for (const Variant& v : choices(p, kTarget).value())
      CHECK(v.slab == 0);
    CHECK(choose(p, kTarget, {1, 8192, 1}).value() ==
          choose(p, kTarget, {1, 8192, 1}, std::size_t{1} << 40U).value());
  }
  const Problem p = production(32, 32, false, 0);
  const auto refused = choose(p, kTarget, {1, 8192, 1}, 1'000'000);
  REQUIRE_FALSE(refused);
  std::size_t least = kLimit;
  for (const Candidate& c : enumerate(p, kTarget))
    if (c.rejected.empty()) least = std::min(least, workspace_layout(p, c.variant, {1, 8192, 1}).bytes);
  CHECK_THAT(refused.error().message, Catch::Matchers::Contains(std::to_string(least) + " bytes at least"));
  CHECK(choose(p, kTarget, {1, 8192, 1}, least));
}

TEST_CASE("a call in slabs takes at most 64 launches, whatever its sizes, and every chunk is in one slab") {
  for (const bool varlen : {false, true})
    for (const int interval : {0, 64, 4096})
      for (const int heads : {32, 8}) {
        const Problem p = production(heads, 32, varlen, interval);
        for (const Sizes& s : {Sizes{1, 0, 1}, Sizes{1, 1, 1}, Sizes{1, 8192, 1}, Sizes{1, 8191, 700},
                               Sizes{1, std::int64_t{1} << 22, 1}, Sizes{64, 100, 64}, Sizes{3, 5000, 3},
                               Sizes{4096, 1024, 4096}}) {
          if (varlen ? s.batch != 1 : s.batch != s.sequences) continue;
          for (const Candidate& c : enumerate(p, kTarget)) {
            if (!c.rejected.empty() || c.variant.slab == 0) continue;
            INFO(to_string(p) << ": " << to_string(c.variant) << " for B=" << s.batch << " T=" << s.tokens);
            const LaunchList list = launches(p, c.variant, kTarget, s);
            CHECK(list.count <= LaunchList::kMost);
            const Slabs slabs = list.slabs;
            const std::int64_t row = (s.tokens + c.variant.chunk - 1) / c.variant.chunk;
            CHECK(std::int64_t{slabs.chunks} * slabs.pieces >= row);
            const int unit = interval / c.variant.chunk;
            if (varlen) continue;
            CHECK(std::int64_t{slabs.rows} * (slabs.count / slabs.pieces) >= s.batch);
            if (unit > 0 && slabs.pieces > 1) CHECK(slabs.chunks % unit == 0); // where states were saved
          }
        }
      }
}
