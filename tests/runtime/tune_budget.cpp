// What the tuner does with its time and memory, and with a device that others use or that is noisy.
#include "tuned.h"
#include <cmath>
#include <random>
#include <set>

using namespace kda;
using namespace kda::test;
using Catch::Matchers::Contains;

namespace {

/// How often each variant was launched on the tensors that are timed.
struct Timed {
  explicit Timed(Tuned& t) {
    t.backend->on_launch = [this, &t](const SourceUnit& unit, const Launch&, const KernelArgs& a) {
      if (a.tokens == kSizes.tokens) {
        ++count[t.variant_of(unit)];
        if (on_call) on_call(t.variant_of(unit));
      }
      return compute(a);
    };
  }
  std::map<std::string, int> count;
  std::function<void(const std::string&)> on_call;
};

} // namespace

TEST_CASE("a loser is stopped after one sample when it is hopeless, after two when it is behind") {
  Tuned t;
  const auto others = t.others();
  REQUIRE(others.size() >= 3);
  t.times[others[0]] = 100;
  t.times[others[1]] = 15;
  t.times[others[2]] = 11;
  Timed timed(t);
  const TuneReport report = t.tune(engine_on(t.backend));
  CHECK(timed.count[others[0]] == 2); // a warm-up and a sample
  CHECK(timed.count[others[1]] == 3);
  CHECK(timed.count[others[2]] > 10);
  CHECK_THAT(row_of(report, others[0]).reason, Contains("stopped after 1 samples: 10.0 times the best"));
  CHECK_THAT(row_of(report, others[1]).reason, Contains("stopped after 2 samples: 1.5 times the best"));
  CHECK(row_of(report, others[0]).status == "ok");
  CHECK(row_of(report, others[0]).median_us == 100);
  CHECK(std::isnan(row_of(report, others[0]).spread_us)); // not 0, which would be a sure row
  CHECK(row_of(report, others[2]).spread_us == 0);
}

TEST_CASE("candidates have their turn in order of the cost model's estimate") {
  const Tuned t;
  std::vector<double> estimates;
  TuneRequest request;
  request.progress = [&](const TuneProgress& p) {
    if (p.stage == "timing")
      estimates.push_back(
          estimate_us(t.problem, parse_variant(p.variant).value(), t.backend->target(), kSizes));
  };
  REQUIRE(engine_on(t.backend).tune(t.problem, kScripted, kSizes, request));
  CHECK(estimates.size() == t.variants.size());
  CHECK(std::is_sorted(estimates.begin(), estimates.end()));
}

TEST_CASE("a candidate that the budget has no time for is skipped, with the stage in its row") {
  Tuned t;
  EngineOptions options = options_on(t.backend);
  options.tune_budget_seconds = 1;
  const auto last = [&] { // of the candidates; the untuned choice has its turn anyway
    const TuneReport report = t.tune(Engine::create(options).value());
    CHECK(row_of(report, t.standard).status == "ok");
    CHECK(row_of(report, t.standard).median_us > 0);
    CHECK(chosen(report) == t.standard);
    CHECK(report.rows.back().status == "skipped");
    return report.rows.back().reason;
  };
  SECTION("compiling ends at half of it") {
    t.backend->on_compile = [&](const SourceUnit& unit) {
      t.backend->clock += 0.6;
      return ScriptedBackend::image_of(unit);
    };
    options.threads = 1;
    CHECK_THAT(last(), Contains("not compiled: half of the tuning budget of 1 s was spent"));
  }
  SECTION("checking ends at three quarters") {
    t.backend->on_launch = [&](const SourceUnit&, const Launch&, const KernelArgs& a) {
      if (a.tokens != kSizes.tokens) t.backend->clock += 0.4;
      return compute(a);
    };
    CHECK_THAT(last(), Contains("not checked: three quarters of the tuning budget of 1 s was spent"));
  }
  SECTION("timing ends at all of it") {
    t.backend->on_launch = [&](const SourceUnit&, const Launch&, const KernelArgs& a) {
      if (a.tokens == kSizes.tokens) t.backend->clock += 0.6;
      return compute(a);
    };
    CHECK_THAT(last(), Contains("not timed: the tuning budget of 1 s was spent"));
  }
}

TEST_CASE("a kernel that takes half of the budget a launch still gets a sample") {
  Tuned t;
  EngineOptions options = options_on(t.backend);
  options.tune_budget_seconds = 1;
  Timed timed(t);
  timed.on_call = [&](const std::string&) { t.backend->clock += 0.5; };
  t.times[t.standard] = 1e5;
  const TuneReport report = t.tune(Engine::create(options).value());
  CHECK(row_of(report, t.standard).status == "ok");
  CHECK(row_of(report, t.standard).median_us == 1e5);
  CHECK(chosen(report) == t.standard);
  CHECK(timed.count[t.standard] <= 3);
}

TEST_CASE("a kernel that takes more than the budget is launched once, and that is its sample") {
  Tuned t;
  EngineOptions options = options_on(t.backend);
  options.tune_budget_seconds = 0.2;
  Timed timed(t);
  timed.on_call = [&](const std::string&) { t.backend->clock += 0.3; };
  const TuneReport report = t.tune(Engine::create(options).value());
  CHECK(row_of(report, t.standard).median_us == 10);
  CHECK(timed.count[t.standard] == 1);
}

TEST_CASE("samples that something else disturbed are taken again") {
  Tuned t;
  int fills = 0;
  bool disturbed = false;
  t.backend->on_fill = [&] {
    disturbed = ++fills > 50 && fills % 3 == 0; // after the calibration
    return disturbed ? 1.4 : 1.0;
  };
  t.backend->on_time = [&](const SourceUnit& last) {
    const double us = t.variant_of(last) == t.other() ? 5 : 10;
    return disturbed ? 20 * us : us;
  };
  const TuneReport report = t.tune(engine_on(t.backend));
  CHECK(chosen(report) == t.other());
  for (const TuneRow& row : report.rows) {
    INFO(row.variant);
    CHECK(row.median_us == (row.variant == t.other() ? 5 : 10));
    CHECK_THAT(row.reason, !Contains("something else"));
  }
}

TEST_CASE("on a device that is never calm a sample is taken again eight times, and the row says so") {
  Tuned t;
  int fills = 0;
  t.backend->on_fill = [&] { return ++fills > 50 ? 1.4 : 1.0; };
  Timed timed(t);
  t.times[t.other()] = 100; // one warm-up and one sample
  const TuneReport report = t.tune(engine_on(t.backend));
  CHECK(timed.count[t.other()] == 2 * 9);
  CHECK_THAT(row_of(report, t.other()).reason, Contains("while something else used the device"));
  CHECK_FALSE(chosen(report).empty());
}

TEST_CASE("the tuner keeps within its memory budget, and with 64 MiB says that the untuned choice stays") {
  Tuned t;
  std::vector<std::string> log;
  EngineOptions options = options_on(t.backend, {}, &log);
  options.tune_memory_bytes = std::size_t{160} << 20U; // the flush buffer has 128 MiB
  CHECK_FALSE(chosen(t.tune(Engine::create(options).value())).empty());
  CHECK(t.backend->peak_bytes <= options.tune_memory_bytes);
  CHECK(t.backend->peak_bytes > std::size_t{128} << 20U);
  CHECK(t.backend->live_bytes == 0);
  CHECK(log.end() ==
        std::find_if(log.begin(), log.end(), [](const auto& x) { return x.find("fits") != x.npos; }));

  options.tune_memory_bytes = std::size_t{64} << 20U;
  t.backend->peak_bytes = 0;
  const Engine engine = Engine::create(options).value();
  const TuneReport report = t.tune(engine);
  CHECK(chosen(report).empty());
  for (const TuneRow& row : report.rows) {
    CHECK(row.status == "skipped");
    CHECK_THAT(row.reason, Contains("more than the 64.0 MiB that a tuner may hold"));
  }
  CHECK_THAT(log.back(), Contains("the untuned choice stays"));
  CHECK(t.backend->peak_bytes <= options.tune_memory_bytes);
  CHECK(to_string(engine.plan(t.problem, kScripted, kSizes).value().variant()) == t.standard);

  options.tune_memory_bytes =
      (std::size_t{128} << 20U) + (std::size_t{300} << 10U); // the buffer or the tensors
  CHECK(chosen(t.tune(Engine::create(options).value())).empty());
  CHECK(t.backend->peak_bytes <= options.tune_memory_bytes);

  options.tune_memory_bytes = std::size_t{40} << 10U; // not even the tensors of a check
  CHECK(chosen(t.tune(Engine::create(options).value())).empty());
  CHECK(t.backend->live == 0);
}

TEST_CASE("what memory kept from being timed is tried again by mode on, until something is chosen") {
  const cache::test::Scratch scratch;
  Tuned t;
  t.times[t.other()] = 5;
  EngineOptions options = options_on(t.backend, scratch.path());
  options.tune = TuneMode::on;
  const auto variant = [&] {
    const Engine engine = Engine::create(options).value();
    return engine.prepare(engine.plan(t.problem, kScripted, kSizes).value()).value().info().variant;
  };
  options.tune_memory_bytes = std::size_t{64} << 20U;
  CHECK(variant() == t.standard);
  options.tune_memory_bytes = 0;
  CHECK(variant() == t.other());
  const int launches = t.backend->launches;
  CHECK(variant() == t.other());
  CHECK(t.backend->launches == launches);
}

TEST_CASE("candidates that are alike are a tie, twenty times of twenty, whatever the noise") {
  Tuned t;
  std::mt19937 random(3);
  std::normal_distribution<double> noise(10, 0.5);
  t.backend->on_time = [&](const SourceUnit&) { return std::abs(noise(random)); };
  for (int run = 0; run < 20; ++run) {
    const TuneReport report = t.tune(engine_on(t.backend));
    CHECK(chosen(report) == t.standard);
    CHECK_THAT(row_of(report, t.standard).reason, Contains("tie with '"));
  }
}

TEST_CASE("a gain beyond the noise is no tie") {
  Tuned t;
  t.times[t.other()] = 5;
  const TuneReport report = t.tune(engine_on(t.backend));
  CHECK(chosen(report) == t.other());
  CHECK_THAT(row_of(report, t.other()).reason, !Contains("tie"));
}

TEST_CASE("with a graph every sample is a replay; with a warm L2 a call comes before it") {
  Tuned t;
  EngineOptions options = options_on(t.backend);
  CHECK(t.tune(Engine::create(options).value()).mode == "cold L2, eager");
  CHECK(t.backend->timings > 0);
  CHECK(t.backend->replays == 0);

  options.tune_timing = {.warm_l2 = true, .graph = true};
  t.backend->timings = 0;
  Timed timed(t);
  CHECK(t.tune(Engine::create(options).value()).mode == "warm L2, graph");
  CHECK(t.backend->replays == t.backend->timings);
  int calls = 0;
  for (const auto& [variant, count] : timed.count)
    calls += count;
  CHECK(calls == 2 * t.backend->timings);
}

TEST_CASE("a tuned first call leaves the caller's tensors as a later call does") {
  Tuned t;
  t.times[t.other()] = 5;
  int on_ours = 0;
  std::vector<float> g(static_cast<std::size_t>(kSizes.tokens * t.problem.key_dim)), o(g.size());
  for (std::size_t i = 0; i < g.size(); ++i)
    g[i] = -0.001F * static_cast<float>(i % 777);
  t.backend->on_launch = [&](const SourceUnit&, const Launch&, const KernelArgs& a) {
    on_ours += a.g.data == g.data() || a.o.data == o.data() ? 1 : 0;
    return compute(a);
  };
  const Engine engine = engine_on(t.backend, {}, nullptr, TuneMode::on);
  Args args;
  args.g = contiguous(g.data(), DType::fp32, {1, kSizes.tokens, 1, t.problem.key_dim});
  args.o = contiguous(o.data(), DType::fp32, {1, kSizes.tokens, 1, t.problem.key_dim});
  const std::vector<float> before = g;
  REQUIRE(engine.run(t.problem, kScripted, kSizes, args));
  const std::vector<float> first = o;
  CHECK(on_ours == 1); // the tuner has tensors of its own
  REQUIRE(engine.run(t.problem, kScripted, kSizes, args));
  CHECK(o == first);
  CHECK(g == before);
  CHECK(on_ours == 2);
}

TEST_CASE("a thousand lengths of one bucket cost one tuning and compile nothing more") {
  Tuned t;
  EngineOptions options = options_on(t.backend);
  options.tune = TuneMode::on;
  const Engine engine = Engine::create(options).value();
  const auto prepare = [&](std::int64_t tokens) {
    REQUIRE(engine.prepare(engine.plan(t.problem, kScripted, {1, tokens, 1}).value()));
  };
  prepare(1025);
  const int launches = t.backend->launches, compiles = t.backend->compiles;
  CHECK(launches > 0);
  for (std::int64_t tokens = 1026; tokens <= 2026; ++tokens)
    prepare(tokens);
  CHECK(t.backend->launches == launches);
  CHECK(t.backend->compiles == compiles);
}
