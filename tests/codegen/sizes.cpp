// Launches and workspace of calls with more than 2^31 elements.
#include "codegen/source_unit.h"
#include <catch2/catch.hpp>

using namespace kda;

namespace {

/// 96 heads of 128: 2^31 elements of q are 174,763 tokens.
Problem large(Operation operation) {
  Problem p;
  p.operation = operation;
  p.heads = p.value_heads = 96;
  p.gate = GateKind::bounded;
  p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true;
  return p;
}

/// CTAs of all launches.
std::int64_t ctas(const Problem& p, const Variant& v, const Target& t, std::int64_t tokens) {
  const LaunchList list = launches(p, v, t, {1, tokens, 1});
  std::int64_t sum = 0;
  for (int i = 0; i < list.count; ++i) {
    const Launch& l = list.items[static_cast<std::size_t>(i)];
    CHECK(l.ctas > 0);
    CHECK(l.ctas <= kMostCtas);
    CHECK(l.block > 0);
    sum += l.ctas;
  }
  return sum;
}

} // namespace

TEST_CASE("CTAs and workspace grow with the tokens beyond 2^31 elements and 2^32 bytes") {
  const Target t = cuda_target("sm_90a").value();
  constexpr std::int64_t kTokens = std::int64_t{1} << 22; // 2^35.6 elements of q
  for (const Operation operation :
       {Operation::forward, Operation::backward, Operation::gate, Operation::gate_backward}) {
    const Problem p = large(operation);
    for (const Candidate& c : enumerate(p, t)) {
      if (!c.rejected.empty()) continue;
      INFO(to_string(p) << ": " << to_string(c.variant));
      const auto bytes = [&](std::int64_t tokens) {
        return static_cast<std::int64_t>(workspace_layout(p, c.variant, {1, tokens, 1}).bytes);
      };
      // What does not grow (a launch over heads alone) is in each of the three.
      CHECK(ctas(p, c.variant, t, 4 * kTokens) - ctas(p, c.variant, t, 2 * kTokens) ==
            2 * (ctas(p, c.variant, t, 2 * kTokens) - ctas(p, c.variant, t, kTokens)));
      CHECK(bytes(4 * kTokens) - bytes(2 * kTokens) == 2 * (bytes(2 * kTokens) - bytes(kTokens)));
      if (operation == Operation::backward) CHECK(bytes(kTokens) > std::int64_t{1} << 32);
    }
  }
}

TEST_CASE("states of a large batch are counted in 64 bits") {
  const Target t = cuda_target("sm_90a").value();
  const Problem p = large(Operation::recurrent);
  for (const Candidate& c : enumerate(p, t)) {
    if (!c.rejected.empty()) continue;
    INFO(to_string(c.variant));
    const auto grid = [&](std::int64_t sequences) {
      return launches(p, c.variant, t, {sequences, 1, sequences}).items[0].ctas;
    };
    CHECK(grid(std::int64_t{1} << 26) == grid(std::int64_t{1} << 10) << 16); // beyond 2^31, not wrapped
  }
}
