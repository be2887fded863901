// kda-jit tune: times and checks every variant of a problem on a device and keeps the rows.
#include "command.h"
#include "problem_options.h"
#include "report.h"
#include <fmt/format.h>

namespace kda::tools {
namespace {

struct Options {
  ProblemOptions problem;
  std::string device;
  bool json = false;
};

int tune(const Options& o) {
  const auto problem = o.problem.problem();
  if (!problem) return report_error(problem.error());
  const auto engine = make_engine();
  if (!engine) return report_error(engine.error());
  const auto device = o.device.empty() ? Result<Device>(engine->best_device()) : parse_device(o.device);
  if (!device) return report_error(device.error());
  std::optional<Progress> progress;
  std::string stage;
  const auto report = engine->tune(*problem, *device, o.problem.sizes(), [&](const TuneProgress& p) {
    if (p.total == 0) {
      fmt::print(stderr, "{}\n", p.stage);
      return;
    }
    if (p.stage != stage) progress.emplace(std::string(p.stage), p.total);
    stage = p.stage;
    progress->step("");
  });
  if (!report) return report_error(report.error());
  if (o.json)
    fmt::print("{}\n", reports_json({*report}));
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
  sub->footer("Example: kda-jit tune --heads 96 --tokens 8192 --dt-bias --beta-sigmoid --qk-l2norm\n"
              "The rows are kept; `kda-jit report` shows them and later plans use them.");
  sub->callback([o, &exit] { exit = tune(*o); });
}

} // namespace kda::tools
