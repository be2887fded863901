// Which rows count: those of this device, driver, compiler, timing and image; pins; what is imported.
#include "engine_impl.h"
#include "tuned.h"
#include <cmath>
#include <set>

using namespace kda;
using namespace kda::test;
using cache::test::Scratch;
using Catch::Matchers::Contains;

namespace {

/// The variants that a run of prepare times.
std::set<std::string> timed_by_prepare(const Tuned& t, const EngineOptions& options) {
  std::set<std::string> timed;
  t.backend->on_launch = [&](const SourceUnit& unit, const Launch&, const KernelArgs& a) {
    if (a.tokens == kSizes.tokens) timed.insert(t.variant_of(unit));
    return compute(a);
  };
  const Engine engine = Engine::create(options).value();
  REQUIRE(engine.prepare(engine.plan(t.problem, kScripted, kSizes).value()));
  return timed;
}

std::string explain(const Tuned& t, const EngineOptions& options) {
  return Engine::create(options).value().plan(t.problem, kScripted, kSizes).value().explain();
}

/// A report whose chosen row is `variant`.
TuneReport choosing(TuneReport report, const std::string& variant) {
  for (TuneRow& row : report.rows)
    row.chosen = row.variant == variant;
  return report;
}

} // namespace

TEST_CASE("in mode on a candidate more is one timing, and it wins when it is faster") {
  const Scratch full, less;
  Tuned t;
  TuneReport report = t.tune(engine_on(t.backend, full.path()));
  const std::string added = t.other();
  std::erase_if(report.rows, [&](const TuneRow& row) { return row.variant == added; });
  EngineOptions options = options_on(t.backend, less.path());
  options.tune = TuneMode::on;
  REQUIRE(Engine::create(options).value().import({report}).value() == t.variants.size() - 1);
  t.times[added] = 5;
  CHECK(timed_by_prepare(t, options) == std::set{added});
  CHECK(timed_by_prepare(t, options).empty());
  CHECK_THAT(explain(t, options), Contains(added) && Contains("tuned"));
}

TEST_CASE("a row counts only while the generator makes the image that was measured") {
  const Scratch first, second;
  Tuned t;
  t.times[t.other()] = 5;
  TuneReport report = t.tune(engine_on(t.backend, first.path()));
  CHECK(row_of(report, t.other()).image.size() == 32);
  for (TuneRow& row : report.rows)
    if (row.variant == t.other()) row.image = "of last week";
  EngineOptions options = options_on(t.backend, second.path());
  const Engine engine = Engine::create(options).value();
  REQUIRE(engine.import({report}));
  const Plan plan = engine.plan(t.problem, kScripted, kSizes).value();
  CHECK(to_string(plan.variant()) == t.standard);
  CHECK_THAT(plan.explain(), Contains("tuning rows were ignored: they are of another version of the kernel"));
  options.tune = TuneMode::on;
  CHECK(timed_by_prepare(t, options) == std::set{t.other()});
  CHECK_THAT(explain(t, options), Contains(t.other()) && Contains("tuned"));
}

TEST_CASE("rows of another device, driver, compiler or timing are ignored, and that is said once") {
  const Scratch scratch;
  Tuned t;
  t.times[t.other()] = 5;
  (void)t.tune(engine_on(t.backend, scratch.path()));
  std::vector<std::string> log;
  EngineOptions options = options_on(t.backend, scratch.path(), &log);
  std::string why;
  SECTION("device") {
    t.backend->name_ = "another GPU";
    why = "another device, scripted";
  }
  SECTION("driver") {
    t.backend->driver_ = "2.0";
    why = "another driver, 1.0";
  }
  SECTION("compiler") {
    t.backend->compiler_ = "scripted 2.0";
    why = "another compiler, scripted 1.0";
  }
  SECTION("timing") {
    options.tune_timing.graph = true;
    why = "another timing, cold L2, eager";
  }
  const Engine engine = Engine::create(options).value();
  for (int i = 0; i < 1000; ++i) {
    const Plan plan = engine.plan(t.problem, kScripted, kSizes).value();
    REQUIRE(to_string(plan.variant()) == t.standard);
    REQUIRE_THAT(plan.explain(), Contains("cost model") && Contains(why));
  }
  REQUIRE(log.size() == 1);
  CHECK_THAT(log[0], Contains(why));
  // Tuned here as well, nothing is said any more.
  (void)t.tune(engine);
  CHECK_THAT(engine.plan(t.problem, kScripted, kSizes).value().explain(), Contains("(tuned)"));
}

TEST_CASE("rows whose driver was not known do not stand in the way of good ones") {
  const Scratch scratch;
  Tuned t;
  t.times[t.other()] = 5;
  t.backend->driver_ = "unknown";
  (void)t.tune(engine_on(t.backend, scratch.path()));
  t.backend->driver_ = "1.0";
  const Engine engine = engine_on(t.backend, scratch.path(), nullptr, TuneMode::on);
  CHECK(engine.prepare(engine.plan(t.problem, kScripted, kSizes).value()).value().info().variant ==
        t.other());
  CHECK(engine.reports().value().size() == 2);
}

TEST_CASE("eager and graph timings are rows apart") {
  const Scratch scratch;
  Tuned t;
  EngineOptions options = options_on(t.backend, scratch.path());
  (void)t.tune(Engine::create(options).value());
  options.tune_timing.graph = true;
  t.times[t.other()] = 5;
  (void)t.tune(Engine::create(options).value());
  CHECK_THAT(explain(t, options), Contains(t.other()));
  options.tune_timing.graph = false;
  CHECK_THAT(explain(t, options), Contains(t.standard));
  CHECK(Engine::create(options).value().reports().value().size() == 2);
}

TEST_CASE("mode pinned takes the variant of the pins, whatever the database says, and tunes nothing") {
  const Scratch scratch;
  Tuned t;
  t.times[t.other()] = 5;
  const TuneReport report = t.tune(engine_on(t.backend, scratch.path()));
  const std::string pinned = t.others().back();
  REQUIRE(pinned != t.other());
  const auto file = scratch.path() / "pins.json";
  cache::test::spill(file, write_reports({choosing(report, pinned)}));
  EngineOptions options = options_on(t.backend, scratch.path());
  options.tune = TuneMode::pinned;
  options.tune_pins = {file};
  for (int process = 0; process < 2; ++process) {
    const Engine engine = Engine::create(options).value();
    const Plan plan = engine.plan(t.problem, kScripted, kSizes).value();
    CHECK(to_string(plan.variant()) == pinned);
    CHECK_THAT(plan.explain(), Contains("(pinned)"));
    const int launches = t.backend->launches;
    CHECK(engine.prepare(plan).value().info().choice == "pinned");
    CHECK(t.backend->launches == launches);
    CHECK_THAT(engine.plan(t.problem, kScripted, {1, 9000, 1}).value().explain(),
               Contains("cost model; not pinned"));
  }
  t.backend->driver_ = "2.0"; // pins outlast an update
  t.backend->compiler_ = "scripted 2.0";
  CHECK_THAT(explain(t, options), Contains(pinned) && Contains("pinned when its kernel had another version"));
  t.backend->name_ = "another GPU";
  CHECK_THAT(explain(t, options),
             Contains(t.standard) && Contains("pins were ignored: they are of another device"));
}

TEST_CASE("of two pins of one problem the one that was timed as today counts") {
  const Scratch scratch;
  Tuned t;
  TuneReport eager = t.tune(engine_on(t.backend)), graph = eager;
  graph.mode = "cold L2, graph";
  const auto file = scratch.path() / "pins.json";
  cache::test::spill(file, write_reports({choosing(eager, t.others()[0]), choosing(graph, t.others()[1])}));
  EngineOptions options = options_on(t.backend);
  options.tune = TuneMode::pinned;
  options.tune_pins = {file};
  CHECK_THAT(explain(t, options), Contains(t.others()[0]));
  options.tune_timing.graph = true;
  CHECK_THAT(explain(t, options), Contains(t.others()[1]));
  options.tune_timing.warm_l2 = true; // neither: the first
  CHECK_THAT(explain(t, options), Contains(t.others()[0]));
}

TEST_CASE("pins that cannot be read or cannot run are errors") {
  const Scratch scratch;
  const Tuned t;
  EngineOptions options = options_on(t.backend);
  options.tune = TuneMode::pinned;
  const auto file = scratch.path() / "pins.json";
  options.tune_pins = {file};
  CHECK_THAT(Engine::create(options).error().message, Contains("cannot open") && Contains("pins.json"));
  TuneReport report = t.tune(engine_on(t.backend));
  report.rows = {{"token r=4 sw=4", "ok", "", 1, 0, 0, 0, 0, true, "", ""}};
  cache::test::spill(file, write_reports({report}));
  const auto plan = Engine::create(options).value().plan(t.problem, kScripted, kSizes);
  REQUIRE_FALSE(plan);
  CHECK(plan.error().code == ErrorCode::invalid_argument);
  CHECK_THAT(plan.error().message, Contains("the pin 'token r=4 sw=4' cannot run"));
}

TEST_CASE("imported reports are the rows that were exported") {
  const Scratch from, to;
  Tuned t;
  t.times[t.other()] = 5;
  const std::string exported = [&] {
    const Engine engine = engine_on(t.backend, from.path());
    (void)t.tune(engine);
    return write_reports(engine.reports().value());
  }();
  const Engine engine = engine_on(t.backend, to.path());
  CHECK(engine.import(parse_reports(exported).value()).value() == t.variants.size());
  CHECK(write_reports(engine.reports().value()) == exported); // the times of writing too
  CHECK(to_string(engine.plan(t.problem, kScripted, kSizes).value().variant()) == t.other());
}

TEST_CASE("a request may name what to time and what not to run at all") {
  const Scratch scratch;
  Tuned t;
  std::set<std::string> ran;
  t.backend->on_launch = [&](const SourceUnit& unit, const Launch&, const KernelArgs& a) {
    ran.insert(t.variant_of(unit));
    return compute(a);
  };
  const Engine engine = engine_on(t.backend, scratch.path());
  TuneRequest request;
  request.only = {parse_variant(t.other()).value()};
  request.never = {parse_variant(t.standard).value()};
  const TuneReport report = engine.tune(t.problem, kScripted, kSizes, request).value();
  CHECK(ran.count(t.standard) == 0);
  CHECK(row_of(report, t.other()).status == "ok");
  CHECK(row_of(report, t.other()).median_us == 10);
  CHECK(row_of(report, t.standard).reason == "it was not to run");
  CHECK(row_of(report, t.others()[1]).reason == "not asked for");
  CHECK(engine.reports().value()[0].rows.size() == 1); // of the others nothing is known
}

TEST_CASE("the bucket that tune writes is the one that plan reads, for every length") {
  for (std::int64_t tokens = 1, top = 1; tokens <= 1000000; ++tokens) {
    if (tokens > top) top *= 2;
    REQUIRE(bucket({1, tokens, 1}) == "T" + std::to_string(top) + " N1");
  }
  const Tuned t;
  for (const std::int64_t top : {1, 2, 64, 1024}) {
    const Scratch scratch;
    const Engine engine = engine_on(t.backend, scratch.path());
    CHECK(engine.tune(t.problem, kScripted, {1, top, 1}).value().bucket == bucket({1, top, 1}));
    const auto choice = [&](std::int64_t tokens) {
      return engine.plan(t.problem, kScripted, {1, tokens, 1}).value().explain();
    };
    CHECK_THAT(choice(top), Contains("(tuned"));
    CHECK_THAT(choice(top / 2 + 1), Contains("(tuned"));
    CHECK_THAT(choice(top + 1), Contains("(cost model"));
    if (top > 1) CHECK_THAT(choice(top / 2), Contains("(cost model"));
  }
}
