// Candidates that break the device for their process, kill it or hang.
#include "tune_worker.h"
#include "tuned.h"
#include <chrono>
#include <fmt/format.h>
#include <set>
#include <sys/stat.h>

using namespace kda;
using namespace kda::test;
using cache::test::Scratch;
using Catch::Matchers::Contains;
using Catch::Matchers::StartsWith;

namespace {

const Error kIllegalAddress{
    ErrorCode::device_error, "cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)", {}};

/// From the first launch of `culprit` on the device answers everything with an error.
struct Breaking {
  Breaking(Tuned& t, std::string culprit) {
    t.backend->on_launch = [this, &t, culprit](const SourceUnit& unit, const Launch&, const KernelArgs& a) {
      launched.insert(t.variant_of(unit));
      broken = broken || t.variant_of(unit) == culprit;
      return broken ? Status{} : compute(a);
    };
    t.backend->on_synchronize = [this] {
      return broken ? Status(tl::unexpected(kIllegalAddress)) : Status{};
    };
  }
  bool broken = false;
  std::set<std::string> launched;
};

/// A program in place of kda-jit: writes what it was given beside itself and does what `body` says.
std::filesystem::path worker_of(const Scratch& scratch, const std::string& body) {
  const auto file = scratch.path() / "worker";
  cache::test::spill(file, "#!/bin/bash\n"
                           "here=$(dirname \"$0\")\n"
                           "printf '%s\\n' \"$@\" >\"$here/arguments\"\n"
                           "env | grep ^KDA_JIT_ | sort >\"$here/environment\"\n"
                           "echo x >>\"$here/starts\"\n" +
                               body);
  REQUIRE(::chmod(file.c_str(), 0755) == 0);
  return file;
}
long starts(const Scratch& scratch) {
  const std::string text = cache::test::slurp(scratch.path() / "starts");
  return std::count(text.begin(), text.end(), '\n');
}

} // namespace

TEST_CASE("a candidate that breaks the device is marked, the others are skipped, and later it does not run") {
  const Scratch scratch;
  Tuned t;
  const std::string culprit = t.other();
  t.times[culprit] = 1;
  {
    Breaking breaking(t, culprit);
    std::vector<std::string> log;
    const Engine engine = engine_on(t.backend, scratch.path(), &log);
    const TuneReport report = t.tune(engine);
    CHECK(row_of(report, culprit).status == "faulted");
    CHECK_THAT(row_of(report, culprit).reason, Contains("ILLEGAL_ADDRESS"));
    CHECK(report.rows.size() == t.variants.size());
    CHECK(chosen(report).empty());
    CHECK(row_of(report, t.standard).status == "skipped");
    CHECK_THAT(row_of(report, t.standard).reason, Contains("'" + culprit + "' faulted"));
    CHECK(std::any_of(log.begin(), log.end(), [](const auto& x) { return x.find("tune_worker") != x.npos; }));
  }
  Breaking breaking(t, culprit); // a new process: the device is well
  const TuneReport report = t.tune(engine_on(t.backend, scratch.path()));
  CHECK(breaking.launched.size() == t.variants.size() - 1);
  CHECK(breaking.launched.count(culprit) == 0);
  CHECK(row_of(report, culprit).status == "faulted");
  CHECK(chosen(report) == t.standard);
}

TEST_CASE("a fault while timing leaves what was timed before it") {
  Tuned t;
  t.times[t.standard] = 20; // first in order
  const std::string culprit = [&] {
    std::string last;
    TuneRequest request;
    request.progress = [&](const TuneProgress& p) {
      if (p.stage == "timing") last = p.variant;
    };
    REQUIRE(engine_on(t.backend).tune(t.problem, kScripted, kSizes, request));
    return last;
  }();
  bool broken = false;
  t.backend->on_launch = [&](const SourceUnit& unit, const Launch&, const KernelArgs& a) {
    broken = broken || (t.variant_of(unit) == culprit && a.tokens == kSizes.tokens);
    return compute(a);
  };
  t.backend->on_synchronize = [&] { return broken ? Status(tl::unexpected(kIllegalAddress)) : Status{}; };
  const TuneReport report = t.tune(engine_on(t.backend));
  CHECK(row_of(report, culprit).status == "faulted");
  CHECK(row_of(report, t.standard).status == "ok");
  CHECK(row_of(report, t.standard).median_us == 20);
  CHECK_FALSE(chosen(report).empty());
}

TEST_CASE("an error that passes is a failed candidate, and the others go on") {
  Tuned t;
  const std::string failing = t.other();
  bool once = false;
  t.backend->on_launch = [&](const SourceUnit& unit, const Launch&, const KernelArgs& a) {
    once = t.variant_of(unit) == failing;
    return compute(a);
  };
  t.backend->on_synchronize = [&] {
    return std::exchange(once, false) ? Status(tl::unexpected(kIllegalAddress)) : Status{};
  };
  const TuneReport report = t.tune(engine_on(t.backend));
  CHECK(row_of(report, failing).status == "failed");
  CHECK(chosen(report) == t.standard);
}

TEST_CASE("a worker that a candidate kills is started again without it") {
  const Scratch scratch, cache;
  Tuned t;
  const std::string killer = t.others()[0], winner = t.others()[1];
  TuneReport answer = t.tune(engine_on(t.backend));
  for (TuneRow& row : answer.rows)
    row.median_us = row.variant == winner ? 5 : 10;
  cache::test::spill(scratch.path() / "report.json", write_reports({answer}));
  EngineOptions options = options_on(t.backend, cache.path());
  options.tune_worker = worker_of(scratch, fmt::format(R"(
if ! grep -qxF -- '--never={0}' "$here/arguments"; then
  printf 'progress\tcompiling\t1\t3\t%s\n' '{1}'
  printf 'progress\tchecking\t1\t3\t%s\n' '{1}'
  printf 'progress\tchecking\t2\t3\t%s\n' '{0}'
  kill -SEGV $$
fi
echo report
cat "$here/report.json"
)",
                                                       killer, winner));
  std::vector<std::string> stages;
  TuneRequest request;
  request.progress = [&](const TuneProgress& p) {
    stages.push_back(fmt::format("{} {}/{} {}", p.stage, p.done, p.total, p.variant));
  };
  const int launches = t.backend->launches;
  const Engine engine = Engine::create(options).value();
  const TuneReport report = engine.tune(t.problem, kScripted, kSizes, request).value();
  CHECK(t.backend->launches == launches); // nothing ran here
  CHECK(starts(scratch) == 2);
  CHECK(row_of(report, killer).status == "faulted");
  CHECK_THAT(row_of(report, killer).reason, StartsWith("checking: its process was ended by signal 11"));
  CHECK(chosen(report) == winner);
  CHECK(stages.back() == "checking 2/3 " + killer);
  // It is remembered, so the next tuner does not start with it.
  CHECK(t.tune(engine).rows.size() == report.rows.size());
  CHECK(starts(scratch) == 3);
}

TEST_CASE("a worker whose device broke is started again for what came after") {
  const Scratch scratch;
  Tuned t;
  const std::string culprit = t.others()[0];
  TuneReport good = t.tune(engine_on(t.backend)), broken = good;
  for (TuneRow& row : broken.rows)
    row.status = row.variant == culprit ? "faulted" : "skipped";
  cache::test::spill(scratch.path() / "good.json", write_reports({good}));
  cache::test::spill(scratch.path() / "broken.json", write_reports({broken}));
  EngineOptions options = options_on(t.backend);
  options.tune_worker = worker_of(scratch, fmt::format(R"(echo report
if grep -qxF -- '--never={}' "$here/arguments"; then cat "$here/good.json"; else cat "$here/broken.json"; fi
)",
                                                       culprit));
  const TuneReport report = t.tune(Engine::create(options).value());
  CHECK(starts(scratch) == 2);
  CHECK(row_of(report, culprit).status == "faulted");
  CHECK(chosen(report) == t.standard);
}

TEST_CASE("a worker that says nothing any more is ended, and its candidate is out") {
  const Scratch scratch;
  Tuned t;
  const std::string hanging = t.others()[0];
  cache::test::spill(scratch.path() / "report.json", write_reports({t.tune(engine_on(t.backend))}));
  EngineOptions options = options_on(t.backend);
  options.tune_budget_seconds = 0;
  options.tune_worker = worker_of(scratch, fmt::format(R"(
if ! grep -qxF -- '--never={0}' "$here/arguments"; then
  printf 'progress\ttiming\t1\t3\t%s\n' '{0}'
  exec sleep 1000
fi
echo report
cat "$here/report.json"
)",
                                                       hanging));
  const TuneReport report = t.tune(Engine::create(options).value());
  CHECK(row_of(report, hanging).status == "faulted");
  CHECK(row_of(report, hanging).reason == "timing: it gave no answer for 15 s");
  CHECK(chosen(report) == t.standard);
}

TEST_CASE("a worker that fails or is of another build is an error with what to do, and prepare goes on") {
  const Scratch scratch;
  Tuned t;
  TuneReport other = t.tune(engine_on(t.backend));
  std::vector<std::string> log;
  EngineOptions options = options_on(t.backend, {}, &log);
  options.tune = TuneMode::on;
  const auto error = [&](const std::string& body) {
    options.tune_worker = worker_of(scratch, body);
    const Engine engine = Engine::create(options).value();
    log.clear();
    const Kernel kernel = engine.prepare(engine.plan(t.problem, kScripted, kSizes).value()).value();
    CHECK(kernel.info().variant == t.standard);
    const std::string said = fmt::format("{}", fmt::join(log, "\n"));
    CHECK_THAT(said, Contains("tuning failed, the cost model's choice is used"));
    return said;
  };
  CHECK_THAT(error("exit 3\n"), Contains("while starting: its process ended with code 3"));
  CHECK_THAT(error("kill -KILL $$\n"), Contains("signal 9"));
  CHECK_THAT(error("printf 'progress\\tcompiling\\t1\\t3\\t" + t.other() + "\\n'\nkill -SEGV $$\n"),
             Contains("while compiling"));
  CHECK_THAT(error("printf 'progress\\tchecking\\t1\\t3\\t" + t.other() +
                   "\\nprogress\\tpreparing\\t1\\t1\\t\\n'\nkill -SEGV $$\n"),
             Contains("while preparing"));
  CHECK_THAT(error("printf 'progress\\tchecking\\t1\\t3\\t" + t.other() + "\\n'\nkill -KILL $$\n"),
             Contains("while checking: its process was ended by signal 9"));
  CHECK_THAT(error("echo report\necho nonsense\n"), Contains("report 1"));
  other.problem += " varlen/int32";
  cache::test::spill(scratch.path() / "report.json", write_reports({other}));
  CHECK_THAT(error("echo report\ncat \"$here/report.json\"\n"), Contains("of another build"));
  options.tune_worker = scratch.path() / "absent";
  const Engine engine = Engine::create(options).value();
  CHECK_THAT(engine.tune(t.problem, kScripted, kSizes).error().message, Contains("KDA_JIT_TUNE_WORKER"));
}

TEST_CASE("a worker gets the problem and the options of its parent") {
  const Scratch scratch, cache;
  Tuned t;
  EngineOptions options = options_on(t.backend, cache.path());
  options.tune_worker = worker_of(scratch, "exit 1\n");
  options.tune_budget_seconds = 7;
  options.tune_memory_bytes = std::uint64_t{99} << 20U;
  options.tune_timing = {true, true};
  options.threads = 3;
  options.read_only_caches = {"/a b", "/c"};
  options.nvrtc = "/n";
  CHECK_FALSE(Engine::create(options).value().tune(t.problem, kScripted, kSizes));
  const std::string arguments = cache::test::slurp(scratch.path() / "arguments"),
                    environment = cache::test::slurp(scratch.path() / "environment");
  CHECK_THAT(arguments, StartsWith("tune\n--worker\n--device=emulator\n--operation=gate\n"));
  CHECK_THAT(arguments, Contains("--tokens=1000\n") && Contains("--only=" + t.other() + "\n"));
  CHECK_THAT(arguments, !Contains("--memory-only"));
  CHECK_THAT(environment, Contains("KDA_JIT_CACHE_DIR=" + cache.path().native() + "\n"));
  CHECK_THAT(environment, Contains("KDA_JIT_CACHE_READONLY_DIRS=/a b:/c:\n"));
  CHECK_THAT(environment, Contains("KDA_JIT_NVRTC=/n\n"));
  CHECK_THAT(environment, Contains("KDA_JIT_THREADS=3\n"));
  CHECK_THAT(environment, Contains("KDA_JIT_TUNE_BUDGET_MS=7000\n"));
  CHECK_THAT(environment, Contains("KDA_JIT_TUNE_MEMORY_MB=99\n"));
  CHECK_THAT(environment, Contains("KDA_JIT_TUNE_TIMING=warm-graph\n"));
  CHECK_THAT(environment, !Contains("KDA_JIT_TUNE_WORKER"));
  options.cache_directory = "";
  CHECK_FALSE(Engine::create(options).value().tune(t.problem, kScripted, kSizes));
  CHECK_THAT(cache::test::slurp(scratch.path() / "arguments"), Contains("--memory-only\n"));
}
