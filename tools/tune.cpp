// kda-jit tune: times and checks every variant of a problem on a device and keeps the rows.
#include "command.h"
#include "problem_options.h"
#include "report.h"
#include <cstdio>
#include <fmt/format.h>

namespace kda::tools {
namespace {

struct Options {
  ProblemOptions problem;
  std::string device;
  std::vector<std::string> only, never;
  bool json = false, in_process = false, worker = false, memory_only = false;
};

Result<std::vector<Variant>> variants(const std::vector<std::string>& texts) {
  std::vector<Variant> all;
  for (const std::string& text : texts) {
    const auto variant = parse_variant(text);
    if (!variant) return tl::unexpected(variant.error());
    all.push_back(*variant);
  }
  return all;
}

/// An engine that tunes in this process, or in another one of this program.
Result<Engine> make_tuner(const Options& o) {
  auto options = EngineOptions::from_environment();
  if (!options) return tl::unexpected(options.error());
  if (o.memory_only) options->cache_directory = "";
  if (o.in_process || o.worker)
    options->tune_worker.clear();
  else if (options->tune_worker.empty())
    options->tune_worker = std::filesystem::read_symlink("/proc/self/exe");
  return Engine::create(std::move(*options));
}

int tune(const Options& o) {
  const auto problem = o.problem.problem();
  if (!problem) return report_error(problem.error());
  const auto only = variants(o.only), never = variants(o.never);
  if (!only) return report_error(only.error());
  if (!never) return report_error(never.error());
  const auto engine = make_tuner(o);
  if (!engine) return report_error(engine.error());
  const auto device = o.device.empty() ? Result<Device>(engine->best_device()) : parse_device(o.device);
  if (!device) return report_error(device.error());
  TuneRequest request{{}, *only, *never, o.worker};
  std::optional<Progress> progress;
  std::string stage;
  request.progress = [&](const TuneProgress& p) {
    if (o.worker) { // runtime/src/tune_worker.h describes these lines
      fmt::print("progress\t{}\t{}\t{}\t{}\n", p.stage, p.done, p.total, p.variant);
      std::fflush(stdout); // before the candidate runs
      return;
    }
    if (p.total == 0) {
      fmt::print(stderr, "{}\n", p.stage);
      return;
    }
    if (p.stage != stage) progress.emplace(std::string(p.stage), p.total);
    stage = p.stage;
    progress->at(p.done, p.variant);
  };
  const auto report = engine->tune(*problem, *device, o.problem.sizes(), request);
  if (!report) return report_error(report.error());
  if (o.worker)
    fmt::print("report\n{}\n", write_reports({*report}));
  else if (o.json)
    fmt::print("{}\n", write_reports({*report}));
  else
    print_report(*report);
  return kOk;
}

} // namespace

void add_tune(CLI::App& app, int& exit) {
  auto* const sub = app.add_subcommand("tune", "Time and check every variant of a problem on a device");
  auto o = std::make_shared<Options>();
  o->problem.add_to(*sub);
  sub->add_option("--device", o->device, "host or cuda:N (default: the best there is)");
  sub->add_flag("--json", o->json, "a JSON report on stdout");
  sub->add_option("--only", o->only, "time this variant, e.g. --only='token r=4 sw=4'; may be repeated");
  sub->add_option("--never", o->never, "do not run this variant, not even as the reference; may be repeated");
  sub->add_flag("--in-process", o->in_process,
                "run candidates in this process: one that faults then ends the tuning");
  sub->add_flag("--worker", o->worker)->group("");           // for tuners that start this program
  sub->add_flag("--memory-only", o->memory_only)->group(""); // likewise: no cache directory
  sub->footer("Example: kda-jit tune --heads 96 --tokens 8192 --dt-bias --beta-sigmoid --qk-l2norm\n"
              "The rows are kept; `kda-jit report` shows them and later plans use them.");
  sub->callback([o, &exit] { exit = tune(*o); });
}

} // namespace kda::tools
