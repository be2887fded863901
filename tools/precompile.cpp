// kda-jit precompile: fills the cache for architectures that need not be here.
#include "command.h"
#include "problem_options.h"
#include <atomic>
#include <chrono>
#include <fmt/format.h>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <thread>

namespace kda::tools {
namespace {

struct Options {
  ProblemOptions problem;
  std::string model, file;
  int tensor_parallel = 1, threads = 0;
  std::vector<std::string> architectures;
  bool all_variants = false, json = false;
};

struct Job {
  Problem problem;
  Variant variant;
  Target target;
};

/// The lengths and batches whose untuned choices are compiled: every bucket from one token to 64k.
std::vector<Sizes> typical_sizes(const Problem& p) {
  std::vector<Sizes> all;
  for (std::int64_t tokens = 1; tokens <= 65536; tokens *= 2)
    for (const std::int64_t rows : {1, 8, 64, 512}) {
      if (tokens * rows > 131072) continue;
      all.push_back(p.varlen ? Sizes{1, tokens * rows, rows} : Sizes{rows, tokens, rows});
    }
  return all;
}

Result<std::vector<Job>> make_jobs(const Options& o) {
  Result<std::vector<Problem>> problems = std::vector<Problem>{};
  if (!o.model.empty())
    problems = model_problems(o.model, o.tensor_parallel);
  else if (!o.file.empty())
    problems = read_problems(o.file);
  else {
    const auto one = o.problem.problem();
    problems = one ? Result<std::vector<Problem>>(std::vector<Problem>{*one}) : tl::unexpected(one.error());
  }
  if (!problems) return tl::unexpected(problems.error());
  std::vector<Job> jobs;
  std::set<std::string> seen; // the head count is not part of a kernel's text, so equal texts are one job
  for (const std::string& arch : o.architectures) {
    const auto target = cuda_target(arch);
    if (!target) return tl::unexpected(target.error());
    for (const Problem& p : *problems) {
      std::set<std::string> wanted;
      if (o.all_variants) {
        for (const Candidate& c : enumerate(p, *target))
          if (c.rejected.empty()) wanted.insert(to_string(c.variant));
      } else {
        for (const Sizes& sizes : typical_sizes(p)) {
          const auto variant = choose(p, *target, sizes);
          if (!variant) return tl::unexpected(variant.error());
          wanted.insert(to_string(*variant));
        }
      }
      for (const std::string& text : wanted)
        if (seen.insert(fmt::format("{} {} {}", arch, to_string(p), text)).second)
          jobs.push_back({p, parse_variant(text).value(), *target});
    }
  }
  return jobs;
}

struct Totals {
  std::int64_t compiled = 0, cached = 0, failed = 0;
  std::optional<Error> unavailable; ///< there is no compiler: the same for every image
  nlohmann::json rows = nlohmann::json::array();
};

void compile_all(const Engine& engine, const std::vector<Job>& jobs, int threads, Totals& totals) {
  Progress progress("precompile", static_cast<std::int64_t>(jobs.size()));
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  const auto work = [&] {
    for (std::size_t i = next++; i < jobs.size(); i = next++) {
      const Job& job = jobs[i];
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
        row.update({{"origin", to_string(info->origin)},
                    {"registers", info->registers},
                    {"shared_bytes", info->shared_bytes},
                    {"spill_bytes", info->spill_bytes},
                    {"compile_ms", info->compile_ms},
                    {"key", info->key}});
      } else {
        ++totals.failed;
        row["error"] = info.error().message;
        report_error(info.error());
      }
      totals.rows.push_back(row);
      progress.step(
          fmt::format("{} {} {}", job.target.arch, to_string(job.problem.operation), to_string(job.variant)));
    }
  };
  std::vector<std::jthread> pool;
  pool.reserve(static_cast<std::size_t>(threads));
  for (int i = 0; i < threads; ++i)
    pool.emplace_back(work);
}

int precompile(const Options& o) {
  const auto jobs = make_jobs(o);
  if (!jobs) return report_error(jobs.error());
  const auto engine = make_engine();
  if (!engine) return report_error(engine.error());
  const int threads =
      o.threads > 0 ? o.threads : static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  const auto begin = std::chrono::steady_clock::now();
  Totals totals;
  compile_all(*engine, *jobs, threads, totals);
  if (totals.unavailable) return report_error(*totals.unavailable);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (o.json) {
    const nlohmann::json out{{"schema", 1},
                             {"compiled", totals.compiled},
                             {"cached", totals.cached},
                             {"failed", totals.failed},
                             {"seconds", seconds},
                             {"cache", engine->cache_directory().string()},
                             {"images", totals.rows}};
    fmt::print("{}\n", out.dump(1));
  } else {
    fmt::print(
        "{} images: {} compiled, {} already in the cache, {} failed; {:.1f} s on {} threads; cache {}\n",
        jobs->size(), totals.compiled, totals.cached, totals.failed, seconds, threads,
        engine->cache_directory().empty() ? "in memory only" : engine->cache_directory().string());
  }
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
                "every variant, not only the untuned choices: tuning then compiles nothing");
  sub->add_option("--threads", o->threads, "compiles at a time (default: hardware threads)");
  sub->add_flag("--json", o->json, "a JSON report on stdout");
  sub->footer("Example: kda-jit precompile --model kimi-k3 --tp 8 --arch sm_90a,sm_100a");
  sub->callback([o, &exit] { exit = precompile(*o); });
}

} // namespace kda::tools
