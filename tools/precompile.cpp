// kda-jit precompile: fills the cache for architectures that need not be here.
#include "command.h"
#include "kernel_jobs.h"
#include "problem_options.h"
#include <atomic>
#include <chrono>
#include <fmt/format.h>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <sys/resource.h>
#include <thread>

namespace kda::tools {
namespace {

struct Options {
  ProblemOptions problem;
  std::string model, file, pack;
  int tensor_parallel = 1, threads = 0;
  std::vector<std::string> architectures;
  bool all_variants = false, json = false;
};

Result<std::vector<Problem>> problems_of(const Options& o) {
  if (!o.model.empty()) return model_problems(o.model, o.tensor_parallel);
  if (!o.file.empty()) return read_problems(o.file);
  const auto one = o.problem.problem();
  if (!one) return tl::unexpected(one.error());
  return std::vector<Problem>{*one};
}

Result<std::vector<KernelJob>> make_jobs(const Options& o) {
  const auto problems = problems_of(o);
  if (!problems) return tl::unexpected(problems.error());
  std::vector<KernelJob> jobs;
  for (const std::string& arch : o.architectures) {
    const auto target = cuda_target(arch);
    if (!target) return tl::unexpected(target.error());
    const auto some = kernel_jobs(*problems, *target, o.all_variants);
    if (!some) return tl::unexpected(some.error());
    jobs.insert(jobs.end(), some->begin(), some->end());
  }
  return jobs;
}

struct Totals {
  std::int64_t compiled = 0, cached = 0, failed = 0;
  std::uint64_t bytes = 0;          ///< of the images
  std::set<std::string> keys;       ///< of the images
  std::optional<Error> unavailable; ///< there is no compiler: the same for every image
  nlohmann::json rows = nlohmann::json::array();
};

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Of all threads of this process.
double cpu_seconds() {
  struct rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void compile_all(const Engine& engine, const std::vector<KernelJob>& jobs, int threads, Totals& totals) {
  const auto begin = std::chrono::steady_clock::now();
  Progress progress("precompile", static_cast<std::int64_t>(jobs.size()));
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  const auto work = [&] {
    for (std::size_t i = next++; i < jobs.size(); i = next++) {
      const KernelJob& job = jobs[i];
      const auto info = engine.precompile(job.problem, job.variant, job.target);
      const std::scoped_lock lock(mutex);
      if (!info && info.error().code == ErrorCode::unavailable) {
        next = jobs.size();
        totals.unavailable = info.error();
        return;
      }
      nlohmann::json row{{"problem", to_string(job.problem)},
                         {"variant", to_string(job.variant)},
                         {"arch", job.target.arch}};
      if (info) {
        ++(info->origin == Origin::compiled ? totals.compiled : totals.cached);
        if (totals.keys.insert(info->key).second) totals.bytes += info->image_bytes;
        row.update({{"origin", to_string(info->origin)},
                    {"registers", info->registers},
                    {"shared_bytes", info->shared_bytes},
                    {"spill_bytes", info->spill_bytes},
                    {"bytes", info->image_bytes},
                    {"compile_ms", info->compile_ms},
                    {"key", info->key}});
      } else {
        ++totals.failed;
        row["error"] = info.error().message;
        report_error(info.error());
      }
      totals.rows.push_back(row);
      progress.step(fmt::format("{:.1f} MB {:.0f} s  {} {} {}", static_cast<double>(totals.bytes) / 1e6,
                                seconds_since(begin), job.target.arch, to_string(job.problem.operation),
                                to_string(job.variant)));
    }
  };
  std::vector<std::jthread> pool;
  pool.reserve(static_cast<std::size_t>(threads));
  for (int i = 0; i < threads; ++i)
    pool.emplace_back(work);
}

void print(const Options& o, const Engine& engine, const Totals& totals, const PackReport& pack,
           double seconds) {
  if (o.json) {
    nlohmann::json out{{"schema", 1},
                       {"compiled", totals.compiled},
                       {"cached", totals.cached},
                       {"failed", totals.failed},
                       {"bytes", totals.bytes},
                       {"seconds", seconds},
                       {"cpu_seconds", cpu_seconds()},
                       {"cache", engine.cache_directory().string()},
                       {"images", totals.rows}};
    if (!o.pack.empty())
      out["pack"] = {
          {"file", o.pack}, {"entries", pack.entries}, {"bytes", pack.bytes}, {"digest", pack.digest}};
    fmt::print("{}\n", out.dump(1));
    return;
  }
  fmt::print(
      "{} images of {:.1f} MB: {} compiled, {} already in the cache, {} failed; {:.1f} s, {:.1f} s of CPU; "
      "cache {}\n",
      totals.keys.size(), static_cast<double>(totals.bytes) / 1e6, totals.compiled, totals.cached,
      totals.failed, seconds, cpu_seconds(),
      engine.cache_directory().empty() ? "in memory only" : engine.cache_directory().string());
  if (!o.pack.empty())
    fmt::print("pack {}: {} images, {:.1f} MB, digest {}\n", o.pack, pack.entries,
               static_cast<double>(pack.bytes) / 1e6, pack.digest);
}

int precompile(const Options& o) {
  const auto begin = std::chrono::steady_clock::now();
  const auto jobs = make_jobs(o);
  if (!jobs) return report_error(jobs.error());
  auto options = EngineOptions::from_environment();
  if (!options) return report_error(options.error());
  if (o.threads > 0) options->threads = o.threads;
  const int threads = options->threads > 0
                          ? options->threads
                          : static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  const auto engine = Engine::create(std::move(*options));
  if (!engine) return report_error(engine.error());
  Totals totals;
  compile_all(*engine, *jobs, threads, totals);
  if (totals.unavailable) return report_error(*totals.unavailable);
  PackReport pack;
  // A pack that lacks what did not compile would be taken for the whole.
  if (!o.pack.empty() && totals.failed == 0) {
    const auto written = engine->pack(o.pack, totals.keys);
    if (!written) return report_error(written.error());
    pack = *written;
  }
  print(o, *engine, totals, pack, seconds_since(begin));
  return totals.failed == 0 ? kOk : kFailed;
}

} // namespace

void add_precompile(CLI::App& app, int& exit) {
  auto* const sub = app.add_subcommand("precompile", "Compile kernels into the cache; no GPU needed");
  auto o = std::make_shared<Options>();
  o->problem.add_to(*sub);
  auto* const model =
      sub->add_option("--model", o->model,
                      fmt::format("every kernel that a model asks for: {}", fmt::join(model_names(), ", ")));
  sub->add_option("--tp", o->tensor_parallel, "tensor-parallel degree of --model")->capture_default_str();
  sub->add_option("--file", o->file, "a JSON array of problems (keys as the options, with underscores)")
      ->excludes(model);
  sub->add_option("--arch", o->architectures,
                  "architectures, comma separated, e.g. sm_80,sm_90a,sm_100a,sm_120a")
      ->delimiter(',')
      ->required();
  sub->add_flag("--all-variants", o->all_variants,
                "every variant: tuning then compiles nothing (default: every one that the cost model chooses "
                "for some batch and length)");
  sub->add_option("--pack", o->pack, "also write the images into this file, for KDA_JIT_CACHE_PACKS");
  sub->add_option("--threads", o->threads,
                  "compiles at a time, fewer where memory is short (default: hardware threads)");
  sub->add_flag("--json", o->json, "a JSON report on stdout");
  sub->footer(
      "Example: kda-jit precompile --model kimi-k3 --tp 8 --arch sm_90a --pack kimi-k3-tp8.kdapack\n"
      "Without tuning rows, calls of up to 2^22 tokens and 2^14 sequences on a full card of the architecture "
      "then compile nothing.\nThe time is wall time; no pack is written when an image fails (exit code 1).");
  sub->callback([o, &exit] { exit = precompile(*o); });
}

} // namespace kda::tools
