// The host's recurrence on a state pool.
#include "host_backend.h"
#include "pool_cases.h"
#include <catch2/catch.hpp>

using namespace kda;

TEST_CASE("host recurrence: states in the slots of a pool") {
  const auto backend = make_host_backend(2).value();
  for (const test::NamedPoolCall& c : test::pool_calls()) {
    const Problem& p = c.call.options.problem;
    CAPTURE(c.name, to_string(p));
    for (const char* variant : {"token r=48", "token r=16"})
      CHECK(test::run_pool(*backend, c.call, parse_variant(variant).value()) == "");
  }
}

TEST_CASE("host recurrence: drafts verified by every state, by updates and replay, as trees") {
  const auto backend = make_host_backend(2).value();
  for (const test::NamedPoolCall& c : test::verify_calls()) {
    const Problem& p = c.call.options.problem;
    CAPTURE(c.name, to_string(p));
    REQUIRE(validate(p));
    for (const char* variant : {"token r=48", "token r=16"})
      CHECK(test::run_pool(*backend, c.call, parse_variant(variant).value()) == "");
  }
}

TEST_CASE("host recurrence: -1 is padding, in either type") {
  const auto backend = make_host_backend(1).value();
  for (const IndexType type : {IndexType::int32, IndexType::int64}) {
    test::PoolCall c = test::pool_call(3, type, PaddingPolicy::negative);
    c.read = c.write = {-1, 2, -1};
    CHECK(test::run_pool(*backend, c, parse_variant("token r=48").value()) == "");
  }
}

TEST_CASE("host recurrence: slots beyond 2^31 elements") { // B15, B16, B29
  const auto backend = make_host_backend(1).value();
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k})
    for (const test::FarSlot& far : test::far_slots()) {
      CAPTURE(to_string(layout), far.heads, far.slot);
      CHECK(test::run_far_slot(*backend, parse_variant("token r=128").value(), layout, far) == "");
    }
}
