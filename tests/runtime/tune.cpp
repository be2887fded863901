// The tuner's decisions, on a device whose kernels are a line of this file and whose clock is the test's.
#include "kda/case_io.h"
#include "tuned.h"
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>
#include <thread>

using namespace kda;
using namespace kda::test;
using cache::test::Scratch;

namespace {

/// What any forward kernel of small_problem computes, for the contiguous tensors that the tuner makes.
Status forward_by_reference(Problem p, const KernelArgs& a) {
  p.heads = a.heads;
  p.value_heads = a.value_heads;
  reference::Inputs in;
  in.problem = p;
  in.sizes = {a.batch, a.tokens, a.sequences};
  in.scale = a.scale;
  in.lower_bound = a.lower_bound;
  const auto read = [](const void* data, DType type, std::int64_t count) {
    std::vector<std::byte> bytes(static_cast<std::size_t>(count * size_of(type)));
    std::memcpy(bytes.data(), data, bytes.size());
    return unpack(bytes, file_dtype(type));
  };
  const auto write = [](void* data, DType type, const reference::Array& x) {
    const std::vector<std::byte> bytes = pack(x, type);
    std::memcpy(data, bytes.data(), bytes.size());
  };
  const std::int64_t rows = a.batch * a.tokens, hv = a.value_heads;
  in.q = read(a.q.data, p.dtype, rows * a.heads * p.key_dim);
  in.k = read(a.k.data, p.dtype, rows * a.heads * p.key_dim);
  in.v = read(a.v.data, p.dtype, rows * hv * p.value_dim);
  in.g = read(a.g.data, p.gate_dtype, rows * hv * p.key_dim);
  in.beta = read(a.beta.data, p.beta_dtype, rows * hv);
  in.A_log = read(a.A_log, DType::fp32, hv);
  in.dt_bias = read(a.dt_bias, DType::fp32, hv * p.key_dim);
  in.initial_state = read(a.initial_state.data, p.state_dtype, a.sequences * hv * p.key_dim * p.value_dim);
  const reference::Outputs out = reference::recurrence(in);
  write(a.o.data, p.dtype, out.o);
  write(a.final_state.data, p.state_dtype, out.final_state);
  return {};
}
Problem forward_problem() {
  Problem p = small_problem();
  p.key_dim = p.value_dim = 32;
  return p;
}

} // namespace

TEST_CASE("every candidate gets a row; the fastest is chosen and later plans use it") {
  const Scratch scratch;
  Tuned t;
  t.times[t.other()] = 5;
  double bytes = 0;
  {
    const Engine engine = engine_on(t.backend, scratch.path());
    const TuneReport report = t.tune(engine);
    bytes = report.bytes;
    CHECK(report.rows.size() == enumerate(t.problem, t.backend->target()).size());
    for (const TuneRow& row : report.rows) {
      CHECK(row.status == "ok");
      CHECK(row.error < 1e-5);
      CHECK(row.registers == 100);
    }
    CHECK(chosen(report) == t.other());
    CHECK(row_of(report, t.other()).median_us == 5);
    CHECK(report.floor_us > 0);
    CHECK(report.bytes > 0);
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
  CHECK(reports[0].bytes == bytes);
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

TEST_CASE("tuning gives all memory back; where nothing fits the untuned choice stays, and that is said") {
  Tuned t;
  (void)t.tune(engine_on(t.backend));
  CHECK(t.backend->live == 0);
  t.backend->memory_limit = std::size_t{1} << 20U; // less than the flush buffer
  std::vector<std::string> log;
  const Engine engine = engine_on(t.backend, {}, &log);
  const TuneReport report = t.tune(engine);
  CHECK(chosen(report).empty());
  for (const TuneRow& row : report.rows)
    CHECK_THAT(row.status + " " + row.reason, Catch::Matchers::StartsWith("skipped not timed: the scripted"));
  CHECK(std::any_of(log.begin(), log.end(),
                    [](const std::string& x) { return x.find("the untuned choice stays") != x.npos; }));
  CHECK(to_string(engine.plan(t.problem, kScripted, kSizes).value().variant()) == t.standard);
  CHECK(t.backend->live == 0);
}

TEST_CASE("a candidate whose workspace does not fit is out with a reason, and the others go on") {
  const Problem p = forward_problem();
  const Sizes sizes{1, 1000000, 1};
  auto backend = std::make_shared<ScriptedBackend>();
  std::vector<std::size_t> bytes;
  for (const Candidate& c : enumerate(p, backend->target()))
    if (c.rejected.empty()) bytes.push_back(workspace_layout(p, c.variant, sizes).bytes);
  backend->memory_limit = *std::max_element(bytes.begin(), bytes.end()) - 1;
  REQUIRE(backend->memory_limit > std::size_t{128} << 20U); // the flush buffer fits
  backend->on_launch = [&](const SourceUnit&, const Launch& l, const KernelArgs& a) {
    return l.entry == 0 && a.tokens < 1000 ? forward_by_reference(p, a) : Status{};
  };
  const TuneReport report = engine_on(backend).tune(p, kScripted, sizes).value();
  std::size_t out = 0, timed = 0;
  for (const TuneRow& row : report.rows) {
    if (row.status == "ok") ++timed;
    if (row.reason.find("does not fit") != std::string::npos) {
      ++out;
      CHECK(row.status == "skipped");
      CHECK(workspace_layout(p, parse_variant(row.variant).value(), sizes).bytes > backend->memory_limit);
    }
  }
  CHECK(out > 0);
  CHECK(timed > 0);
  CHECK_FALSE(chosen(report).empty());
  CHECK(backend->live == 0);
}

TEST_CASE("with no budget at all the untuned choice and one token kernel are checked and timed") {
  const Problem p = forward_problem();
  const Sizes sizes{1, 64, 1};
  auto backend = std::make_shared<ScriptedBackend>();
  backend->on_launch = [&](const SourceUnit&, const Launch& l, const KernelArgs& a) {
    return l.entry == 0 ? forward_by_reference(p, a) : Status{};
  };
  EngineOptions options = options_on(backend);
  options.tune_budget_seconds = 0;
  const TuneReport report = Engine::create(options).value().tune(p, kScripted, sizes).value();
  const Variant standard = choose(p, backend->target(), sizes).value();
  REQUIRE(standard.algorithm == Algorithm::chunk);
  std::set<Algorithm> timed;
  int count = 0;
  for (const TuneRow& row : report.rows) {
    const Variant v = parse_variant(row.variant).value();
    CHECK((row.status == "ok" || row.status == "skipped" || row.status == "rejected"));
    if (row.status != "ok") continue;
    ++count;
    timed.insert(v.algorithm);
    CHECK(row.median_us > 0);
    if (v.algorithm == Algorithm::chunk) CHECK(v == standard);
  }
  CHECK(count == 2);
  CHECK(timed == std::set<Algorithm>{Algorithm::chunk, Algorithm::token});
}

TEST_CASE("candidates are held against the token kernel on every head") {
  // Right on the one group of heads that float64 sees; with two heads a chunk variant is wrong in one
  // element of o, by 0.9 of the rms: 0.7% in the L2 norm of 19,200 elements, which is within its tolerance.
  Problem p = forward_problem();
  p.heads = p.value_heads = 2;
  auto backend = std::make_shared<ScriptedBackend>();
  const auto is_chunk = [](const SourceUnit& unit) { return unit.name == "chunk_forward.cu"; };
  double wrong = 0;
  backend->on_launch = [&](const SourceUnit& unit, const Launch& l, const KernelArgs& a) {
    if (l.entry != 0) return Status{};
    Status ok = forward_by_reference(p, a);
    if (ok && is_chunk(unit) && a.value_heads == 2) {
      const auto count = static_cast<std::size_t>(a.batch * a.tokens) * 2 * 32;
      std::vector<std::byte> bytes(count * 2);
      std::memcpy(bytes.data(), a.o.data, bytes.size());
      reference::Array o = unpack(bytes, file_dtype(p.dtype));
      const double rms =
          std::sqrt(std::inner_product(o.begin(), o.end(), o.begin(), 0.0) / static_cast<double>(count));
      *std::min_element(o.begin(), o.end(), [](double x, double y) { return std::abs(x) < std::abs(y); }) +=
          wrong * rms;
      bytes = pack(o, p.dtype);
      std::memcpy(a.o.data, bytes.data(), bytes.size());
    }
    return ok;
  };
  const auto statuses = [&](bool chunk) {
    std::set<std::string> all;
    const TuneReport report = engine_on(backend).tune(p, kScripted, {1, 64, 1}).value();
    for (const TuneRow& row : report.rows)
      if (row.status != "rejected" && (row.variant.rfind("chunk", 0) == 0) == chunk)
        all.insert(row.status + " " +
                   row.reason.substr(0, std::min(row.reason.find(" by "), row.reason.find("; tie"))));
    return all;
  };
  using Set = std::set<std::string>;
  CHECK(statuses(true) == Set{"ok spills 8 bytes"});
  wrong = 0.9;
  CHECK(statuses(true) == Set{"wrong o has an element off"});
  CHECK(statuses(false) == Set{"ok spills 8 bytes"});
  wrong = std::numeric_limits<float>::infinity();
  CHECK(statuses(true) == Set{"wrong o has 1 non-finite values of 19200"});
}

TEST_CASE("a second tuner of a device waits, says so, and uses what the first has found") {
  const Scratch scratch;
  Tuned t;
  t.times[t.other()] = 5;
  const Engine first = engine_on(t.backend, scratch.path());
  std::atomic<bool> waiting{false};
  const auto second_engine = [&] {
    EngineOptions options;
    options.cache_directory = scratch.path();
    options.emulator = std::make_shared<ScriptedBackend>(); // launches nothing: all would be wrong
    options.tune = TuneMode::on;
    options.log = [&](std::string_view line) {
      if (line.find("waiting for another tuner") != line.npos) waiting = true;
    };
    return Engine::create(options).value();
  };
  std::jthread second;
  std::string variant;
  TuneRequest request;
  request.progress = [&](const TuneProgress& p) {
    if (p.stage != "timing" || second.joinable()) return;
    second = std::jthread([&] {
      const Engine engine = second_engine();
      variant = engine.prepare(engine.plan(t.problem, kScripted, kSizes).value()).value().info().variant;
    });
    for (int i = 0; i < 2000 && !waiting; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
  };
  (void)first.tune(t.problem, kScripted, kSizes, request);
  second.join();
  CHECK(waiting);
  CHECK(variant == t.other());
}
