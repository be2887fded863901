// Tuning on the host: real kernels, a real clock, and the real worker of the scenarios' binary elsewhere.
#include "codegen/source_unit.h"
#include "kda/engine.h"
#include <catch2/catch.hpp>

using namespace kda;

namespace {

Problem small(Operation operation, int heads, int value_heads) {
  Problem p;
  p.operation = operation;
  p.heads = heads;
  p.value_heads = value_heads;
  p.key_dim = p.value_dim = 32;
  p.gate = GateKind::bounded;
  p.dt_bias = true;
  return p;
}

} // namespace

TEST_CASE(
    "host kernels of several heads are found right by the tuner, whose reference has one group of them") {
  EngineOptions options;
  options.cache_directory = "";
  options.threads = 2;
  options.tune_budget_seconds = 0; // the untuned choice and a token kernel, checked and timed once
  options.log = [](std::string_view) {};
  const Engine engine = Engine::create(options).value();
  for (const Operation operation : {Operation::forward, Operation::recurrent, Operation::backward,
                                    Operation::gate, Operation::gate_backward})
    for (const auto& [heads, value_heads] : {std::pair{2, 2}, {2, 6}}) {
      const Problem p = small(operation, heads, value_heads);
      CAPTURE(to_string(p));
      const TuneReport report = engine.tune(p, Device::host(), {1, 40, 1}).value();
      int chosen = 0;
      for (const TuneRow& row : report.rows) {
        CAPTURE(row.variant, row.reason);
        CHECK((row.status == "ok" || row.status == "skipped"));
        chosen += row.chosen ? 1 : 0;
        if (row.chosen) CHECK(row.median_us > 0);
      }
      CHECK(chosen == 1);
    }
}

TEST_CASE("the text of a host kernel does not know how many heads there are, only how many share a key") {
  const Target target = [] {
    EngineOptions options;
    options.cache_directory = "";
    const Engine engine = Engine::create(options).value();
    Target t;
    t.kind = Target::Kind::host;
    t.arch = engine.devices().back().arch;
    t.multiprocessors = 2;
    t.vector_bytes = 32;
    return t;
  }();
  for (const Operation operation :
       {Operation::forward, Operation::recurrent, Operation::gate, Operation::gate_backward}) {
    const auto text = [&](int heads, int value_heads) {
      const Problem p = small(operation, heads, value_heads);
      return emit(p, choose(p, target, {1, 40, 1}).value(), target).value().main;
    };
    CHECK(text(2, 4) == text(8, 16));
  }
}
