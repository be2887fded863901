// recurrent.cu on a state pool, on the emulator with every access checked.
#include "checked.h"
#include "pool_cases.h"
#include <catch2/catch.hpp>

using namespace kda;

TEST_CASE("recurrent kernel: states in the slots of a pool") {
  std::uint64_t row = 0;
  for (const test::NamedPoolCall& c : test::pool_calls()) {
    const auto backend = emulator::make_backend(test::checked(row++)).value();
    const Problem& p = c.call.options.problem;
    CAPTURE(c.name, to_string(p));
    REQUIRE(validate(p));
    const char* const variants[] = {"token sw=4 r=8 st=1 pdl=1", "token sw=1 r=8 st=4",
                                    "token sw=4 r=32 st=1 cs=1", "token c=4 sw=1 r=16 st=1",
                                    "token c=4 sw=1 r=16 st=1 l=8 cs=1"};
    CHECK(test::run_pool(*backend, c.call, parse_variant(variants[row % 5]).value()) == "");
  }
}

TEST_CASE("recurrent kernel: drafts verified by every state, by updates and replay, as trees") {
  std::uint64_t row = 0;
  for (const test::NamedPoolCall& c : test::verify_calls()) {
    const auto backend = emulator::make_backend(test::checked(row++)).value();
    const Problem& p = c.call.options.problem;
    CAPTURE(c.name, to_string(p));
    REQUIRE(validate(p));
    const bool plain = p.tree || p.operation == Operation::replay;
    const char* const variants[] = {
        "token sw=4 r=8 st=1", plain ? "token sw=1 r=8 st=1 pdl=1" : "token sw=1 r=8 st=4",
        "token sw=4 r=32 st=1 cs=1", plain ? "token sw=2 r=16 st=1" : "token c=4 sw=1 r=16 st=1",
        plain ? "token sw=1 r=16 st=1 l=8" : "token c=16 sw=1 r=16 st=1 l=8"};
    CHECK(test::run_pool(*backend, c.call, parse_variant(variants[row % 5]).value()) == "");
  }
}

TEST_CASE("recurrent kernel: -1 is padding, in either type") {
  const auto backend = emulator::make_backend().value();
  for (const IndexType type : {IndexType::int32, IndexType::int64}) {
    test::PoolCall c = test::pool_call(3, type, PaddingPolicy::negative);
    c.read = c.write = {-1, 2, -1};
    CHECK(test::run_pool(*backend, c, parse_variant("token sw=4 r=8 st=1").value()) == "");
  }
}

TEST_CASE("recurrent kernel: slots beyond 2^31 elements") { // B15, B16, B29
  const auto backend = emulator::make_backend().value();
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k})
    for (const test::FarSlot& far : test::far_slots()) {
      CAPTURE(to_string(layout), far.heads, far.slot);
      CHECK(test::run_far_slot(*backend, parse_variant("token sw=4 r=32 st=1").value(), layout, far) == "");
    }
}
