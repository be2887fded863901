// The tuner's decisions, on a device whose kernels are a line of this file and whose clock is the test's.
#include "scratch.h"
#include "scripted_backend.h"
#include <algorithm>
#include <catch2/catch.hpp>
#include <map>

using namespace kda;
using namespace kda::test;
using cache::test::Scratch;

namespace {

constexpr Sizes kSizes{1, 1000, 1};

/// The kernel to tune: a decay in base 2 becomes one in base e.
Problem gate_problem() {
  Problem p = small_problem(Operation::gate);
  p.gate = GateKind::log2;
  p.gate_dtype = DType::fp32;
  p.dt_bias = false;
  return p;
}
Status compute(const KernelArgs& a) {
  const std::int64_t count = a.batch * a.tokens * a.value_heads * gate_problem().key_dim;
  const auto* const g = static_cast<const float*>(a.g.data);
  std::transform(g, g + count, static_cast<float*>(a.o.data), [](float x) { return x * 0.693147181F; });
  return {};
}

/// The variants of the problem by the text that the emitter makes of them.
std::map<std::string, std::string> names(const Problem& p, const Target& t) {
  std::map<std::string, std::string> all;
  for (const Candidate& c : enumerate(p, t))
    if (c.rejected.empty()) {
      const SourceUnit unit = emit(p, c.variant, t).value();
      for (const SourceFile& f : unit.files)
        if (f.name == "config.cuh") all[f.text] = to_string(c.variant);
    }
  return all;
}

/// A device that computes right and takes `times[variant]` microseconds, 10 if not given.
struct Tuned {
  Problem problem = gate_problem();
  std::shared_ptr<ScriptedBackend> backend = std::make_shared<ScriptedBackend>();
  std::map<std::string, std::string> variants = names(problem, backend->target());
  std::map<std::string, double> times;
  std::string standard = to_string(choose(problem, backend->target(), kSizes).value());

  Tuned() {
    backend->remember_last = true;
    backend->on_launch = [](const SourceUnit&, const Launch&, const KernelArgs& a) { return compute(a); };
    backend->on_time = [this](const SourceUnit& last) {
      const auto it = times.find(variant_of(last));
      return it == times.end() ? 10.0 : it->second;
    };
  }
  Tuned(const Tuned&) = delete;
  Tuned& operator=(const Tuned&) = delete;

  [[nodiscard]] std::string variant_of(const SourceUnit& unit) const {
    for (const SourceFile& f : unit.files)
      if (f.name == "config.cuh") return variants.at(f.text);
    return {};
  }
  /// Any variant but the untuned choice.
  [[nodiscard]] std::string other() const {
    for (const auto& [text, name] : variants)
      if (name != standard) return name;
    return {};
  }
  [[nodiscard]] TuneReport tune(const Engine& engine) const {
    auto report = engine.tune(problem, kScripted, kSizes);
    if (!report) FAIL(report.error().message << "\n" << report.error().context);
    return *report;
  }
};

TuneRow row_of(const TuneReport& report, const std::string& variant) {
  for (const TuneRow& row : report.rows)
    if (row.variant == variant) return row;
  FAIL("no row of " << variant);
  return {};
}
std::string chosen(const TuneReport& report) {
  std::string name;
  for (const TuneRow& row : report.rows)
    if (row.chosen) name += row.variant;
  return name;
}

} // namespace

TEST_CASE("every candidate gets a row; the fastest is chosen and later plans use it") {
  const Scratch scratch;
  Tuned t;
  t.times[t.other()] = 5;
  {
    const Engine engine = engine_on(t.backend, scratch.path());
    const TuneReport report = t.tune(engine);
    CHECK(report.rows.size() == enumerate(t.problem, t.backend->target()).size());
    for (const TuneRow& row : report.rows) {
      CHECK(row.status == "ok");
      CHECK(row.error < 1e-5);
      CHECK(row.registers == 100);
    }
    CHECK(chosen(report) == t.other());
    CHECK(row_of(report, t.other()).median_us == 5);
    CHECK(report.floor_us > 0);
    CHECK(report.bucket == "T1024 N1");
  }
  const Engine later = engine_on(t.backend, scratch.path());
  const Plan plan = later.plan(t.problem, kScripted, {1, 513, 1}).value();
  CHECK(to_string(plan.variant()) == t.other());
  CHECK_THAT(plan.explain(), Catch::Matchers::Contains("tuned"));
  CHECK_THAT(later.plan(t.problem, kScripted, {1, 512, 1}).value().explain(), // the next bucket
             Catch::Matchers::Contains("cost model"));
  const auto reports = later.reports().value();
  REQUIRE(reports.size() == 1);
  CHECK(chosen(reports[0]) == t.other());
}

TEST_CASE("rows of another driver or compiler and TuneMode::off leave the cost model's choice") {
  const Scratch scratch;
  Tuned t;
  t.times[t.other()] = 5;
  REQUIRE(chosen(t.tune(engine_on(t.backend, scratch.path()))) == t.other());
  const auto choice = [&](TuneMode mode) {
    const Engine engine = engine_on(t.backend, scratch.path(), nullptr, mode);
    return to_string(engine.plan(t.problem, kScripted, kSizes).value().variant());
  };
  CHECK(choice(TuneMode::cached) == t.other());
  CHECK(choice(TuneMode::off) == t.standard);
  t.backend->driver_ = "2.0";
  CHECK(choice(TuneMode::cached) == t.standard);
  t.backend->driver_ = "1.0";
  t.backend->compiler_ = "scripted 2.0";
  CHECK(choice(TuneMode::cached) == t.standard);
}

TEST_CASE("a tie, or a gain within the noise, keeps the untuned default") {
  Tuned t;
  CHECK(chosen(t.tune(engine_on(t.backend))) == t.standard);
  t.times[t.other()] = 9.9; // 1%
  CHECK(chosen(t.tune(engine_on(t.backend))) == t.standard);
  int i = 0; // 10% faster in the median, but it swings by more
  t.backend->on_time = [&](const SourceUnit& last) {
    return t.variant_of(last) == t.other() ? (++i % 2 == 0 ? 9.0 : 14.0) : 10.0;
  };
  CHECK(chosen(t.tune(engine_on(t.backend))) == t.standard);
}

TEST_CASE("a candidate that computes something else is wrong, and never chosen") {
  Tuned t;
  const std::string liar = t.other();
  t.times[liar] = 1;
  t.backend->on_launch = [&](const SourceUnit& unit, const Launch&, const KernelArgs& a) {
    Status ok = compute(a);
    if (t.variant_of(unit) == liar) static_cast<float*>(a.o.data)[7] += 1;
    return ok;
  };
  const TuneReport report = t.tune(engine_on(t.backend));
  CHECK(row_of(report, liar).status == "wrong");
  CHECK_THAT(row_of(report, liar).reason, Catch::Matchers::Contains("o has error"));
  CHECK(chosen(report) == t.standard);
}

TEST_CASE("a candidate that leaves a part to the one before it is wrong: outputs are poisoned") {
  Tuned t;
  const std::string lazy = t.other();
  t.backend->on_launch = [&](const SourceUnit& unit, const Launch&, const KernelArgs& a) {
    return t.variant_of(unit) == lazy ? Status{} : compute(a);
  };
  const TuneReport report = t.tune(engine_on(t.backend));
  CHECK(row_of(report, lazy).status == "wrong");
}

TEST_CASE("a candidate that changes an input is wrong") {
  Tuned t;
  const std::string greedy = t.other();
  t.backend->on_launch = [&](const SourceUnit& unit, const Launch&, const KernelArgs& a) {
    Status ok = compute(a);
    if (t.variant_of(unit) == greedy) *static_cast<float*>(a.g.data) *= 2;
    return ok;
  };
  const TuneReport report = t.tune(engine_on(t.backend));
  CHECK(row_of(report, greedy).status == "wrong");
  CHECK_THAT(row_of(report, greedy).reason, Catch::Matchers::Contains("input"));
}

TEST_CASE("a candidate that does not compile or launch has failed, and the others go on") {
  Tuned t;
  const std::string broken = t.other();
  t.backend->on_compile = [&](const SourceUnit& unit) -> Result<Image> {
    if (t.variant_of(unit) == broken) return fail(ErrorCode::compile_failed, "too many registers");
    return ScriptedBackend::image_of(unit);
  };
  const TuneReport report = t.tune(engine_on(t.backend));
  CHECK(row_of(report, broken).status == "failed");
  CHECK(row_of(report, broken).reason == "too many registers");
  CHECK(chosen(report) == t.standard);
}

TEST_CASE("with every candidate wrong none is chosen, and the plan is the cost model's") {
  Tuned t;
  t.backend->on_launch = [](auto&&...) { return Status{}; };
  const Engine engine = engine_on(t.backend);
  CHECK(chosen(t.tune(engine)).empty());
  CHECK(to_string(engine.plan(t.problem, kScripted, kSizes).value().variant()) == t.standard);
}

TEST_CASE("TuneMode::on tunes once, and prepare uses the result") {
  Tuned t;
  t.times[t.other()] = 5;
  const Engine engine = engine_on(t.backend, {}, nullptr, TuneMode::on);
  const auto info = [&] {
    return engine.prepare(engine.plan(t.problem, kScripted, kSizes).value()).value().info();
  };
  CHECK(info().variant == t.other());
  const int launches = t.backend->launches;
  const KernelInfo again = info();
  CHECK(again.choice == "tuned");
  CHECK(t.backend->launches == launches);
  CHECK(engine.compile_count() == static_cast<std::int64_t>(t.variants.size()));
}

TEST_CASE("a budget of nothing still times the default") {
  Tuned t;
  EngineOptions options;
  options.cache_directory = "";
  options.emulator = t.backend;
  options.tune_budget_seconds = 0;
  const TuneReport report = t.tune(Engine::create(options).value());
  CHECK(chosen(report) == t.standard);
  CHECK(row_of(report, t.standard).median_us == 10);
  CHECK_THAT(row_of(report, t.other()).reason, Catch::Matchers::Contains("budget"));
}

TEST_CASE("tuning gives all memory back, and says so when there is too little") {
  Tuned t;
  (void)t.tune(engine_on(t.backend));
  CHECK(t.backend->live == 0);
  t.backend->memory_limit = std::size_t{1} << 20U; // less than the flush buffer
  const auto report = engine_on(t.backend).tune(t.problem, kScripted, kSizes);
  REQUIRE_FALSE(report);
  CHECK(report.error().code == ErrorCode::out_of_memory);
  CHECK(t.backend->live == 0);
}
