// recurrent.cu and replay.cu as a server calls them, on the emulator.
#include "decode.h"
#include "emulator.h"
#include <catch2/catch.hpp>

using namespace kda;

namespace {

std::vector<Variant> accepted(const Problem& p) {
  std::vector<Variant> all;
  for (const Candidate& c : enumerate(p, cuda_target("sm_90a").value()))
    if (c.rejected.empty()) all.push_back(c.variant);
  return all;
}

} // namespace

TEST_CASE("recurrent kernel: chained calls have the bits of one; views of one packed buffer") { // B47, B48
  const auto backend = emulator::make_backend().value();
  std::size_t row = 0;
  for (const test::CaseOptions& o : test::decode_cases(false)) {
    const std::vector<Variant> all = accepted(o.problem);
    const Variant& v = all[row++ * 7 % all.size()];
    CAPTURE(to_string(o.problem), o.tokens, to_string(v));
    CHECK(test::run_chained_decode(*backend, o, v) == "");
  }
}

TEST_CASE("recurrent kernel: a replay and a tree have the bits of plain calls") {
  const auto backend = emulator::make_backend().value();
  test::CaseOptions o = test::decode_cases(false)[4];
  o.problem.value_heads = 2;
  o.problem.heads = 1;
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k})
    for (const char* rows : {layout == StateLayout::v_k ? "token sw=1 r=4 st=1" : "token sw=1 r=32 st=1",
                             "token sw=4 r=16 st=1"}) {
      o.problem.state_layout = layout;
      const Variant v = parse_variant(rows).value();
      CAPTURE(to_string(o.problem), rows);
      CHECK(test::run_replayed_decode(*backend, o, v, parse_variant("token sw=1 r=16 st=1 cs=1").value()) ==
            "");
    }
}

TEST_CASE("recurrent kernel: the state is right to 1e-6 after one token and to 1e-5 after 4,096") {
  const auto backend = emulator::make_backend().value();
  CHECK(test::run_long_decode(*backend, StateLayout::v_k, 32,
                              parse_variant("token sw=1 r=32 st=4").value()) == "");
  CHECK(test::run_long_decode(*backend, StateLayout::k_v, 32,
                              parse_variant("token c=16 sw=1 r=16 st=1").value()) == "");
}
