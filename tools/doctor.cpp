// kda-jit doctor: what works here, what does not, and what to do about it.
#include "command.h"
#include "kda/diagnosis.h"
#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace kda::tools {
namespace {

int doctor(bool json) {
  auto options = EngineOptions::from_environment();
  if (!options) return report_error(options.error());
  std::string ignored; // warnings of the engine, which the facts repeat as findings
  options->log = [&](std::string_view line) { ignored += line; };
  const auto engine = Engine::create(*options);
  if (!engine) return report_error(engine.error());
  std::vector<Finding> findings = diagnose(gather_facts(*engine, *options));
  bool any_device = false;
  for (const DeviceInfo& d : engine->devices()) {
    const bool good = d.problem.empty();
    any_device |= good;
    findings.push_back(
        {good,
         fmt::format("{}: {}{}{}{}", to_string(d.device), d.name.empty() ? "not usable" : d.name,
                     d.arch.empty() ? "" : ", " + d.arch, d.driver.empty() ? "" : ", driver " + d.driver,
                     d.compiler.empty() ? "" : ", " + d.compiler),
         d.problem});
  }
  findings.push_back({any_device, fmt::format("best device: {}", to_string(engine->best_device())), ""});
  if (json) {
    nlohmann::json rows = nlohmann::json::array();
    for (const Finding& f : findings)
      rows.push_back({{"good", f.good}, {"what", f.what}, {"advice", f.advice}});
    fmt::print("{}\n", nlohmann::json{{"schema", 1}, {"findings", rows}}.dump(1));
  } else {
    for (const Finding& f : findings) {
      fmt::print("{} {}\n", f.good ? "ok  " : "note", f.what);
      if (!f.advice.empty()) fmt::print("     {}\n", f.advice);
    }
  }
  return any_device ? kOk : kFailed;
}

} // namespace

void add_doctor(CLI::App& app, int& exit) {
  auto* const sub =
      app.add_subcommand("doctor", "Find out what works on this machine and what to do about the rest");
  auto json = std::make_shared<bool>(false);
  sub->add_flag("--json", *json, "JSON on stdout");
  sub->footer("A note is something to mend or to know. Exit code 1 when no device can be used.");
  sub->callback([json, &exit] { exit = doctor(*json); });
}

} // namespace kda::tools
