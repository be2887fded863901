// The host's recurrence and replay as a server calls them.
#include "decode.h"
#include "host_backend.h"
#include "kda/engine.h"
#include <catch2/catch.hpp>

using namespace kda;

namespace {

const Target& target() {
  static const Target t = make_host_backend(1).value()->target();
  return t;
}

} // namespace

TEST_CASE("host recurrence: chained calls have the bits of one; views of one packed buffer") { // B47, B48
  const auto backend = make_host_backend(2).value();
  for (const test::CaseOptions& o : test::decode_cases(true))
    for (const Candidate& c : enumerate(o.problem, target())) {
      CAPTURE(to_string(o.problem), o.tokens, to_string(c.variant));
      CHECK(test::run_chained_decode(*backend, o, c.variant) == "");
      if (o.problem.value_heads > 20) break; // the choice alone
    }
}

TEST_CASE("host recurrence: a replay and a tree have the bits of plain calls") {
  const auto backend = make_host_backend(2).value();
  test::CaseOptions o = test::decode_cases(true)[4];
  o.problem.value_heads = 2;
  o.problem.heads = 1;
  for (const StateLayout layout : {StateLayout::k_v, StateLayout::v_k}) {
    o.problem.state_layout = layout;
    const auto replays = parse_variant("token r=32").value();
    for (const Candidate& c : enumerate(o.problem, target())) {
      CAPTURE(to_string(o.problem), to_string(c.variant));
      CHECK(test::run_replayed_decode(*backend, o, c.variant, replays) == "");
    }
  }
}

TEST_CASE("the tuner checks every form of verifying and replaying on the host") {
  EngineOptions options;
  options.cache_directory = "";
  const Engine engine = Engine::create(options).value();
  Problem p;
  p.operation = Operation::recurrent;
  p.heads = 1;
  p.value_heads = 2;
  p.key_dim = p.value_dim = 32;
  p.state_pool = true;
  const auto check = [&](const Problem& problem) {
    for (const bool varlen : {false, true}) {
      Problem x = problem;
      x.varlen = varlen;
      INFO(to_string(x));
      const auto report = engine.tune(x, Device::host(), varlen ? Sizes{1, 9, 2} : Sizes{2, 4, 2});
      REQUIRE(report);
      for (const TuneRow& row : report->rows) {
        INFO(row.variant << ": " << row.reason);
        CHECK(row.status == "ok");
      }
    }
  };
  check(p);
  p.every_state = true;
  check(p);
  p.updates = p.tree = true;
  check(p);
  p.every_state = false;
  check(p);
  p.operation = Operation::replay;
  p.updates = false;
  check(p);
}
