// kda-jit doctor: what works here, what does not, and what to do about it.
#include "command.h"
#include <filesystem>
#include <fmt/format.h>
#include <fstream>
#include <nlohmann/json.hpp>
#include <unistd.h>

namespace kda::tools {
namespace {

struct Finding {
  bool good;
  std::string what, advice;
};

Finding check_cache(const Engine& engine) {
  const std::filesystem::path directory = engine.cache_directory();
  if (directory.empty())
    return {false, "no cache directory: kernels are compiled again in every process",
            "set KDA_JIT_CACHE_DIR to a directory that this user owns and can write"};
  const std::filesystem::path probe = directory / fmt::format("doctor.{}.tmp", getpid());
  const bool written = static_cast<bool>(std::ofstream(probe) << "probe");
  std::error_code ignored;
  std::filesystem::remove(probe, ignored);
  if (!written)
    return {false, fmt::format("the cache {} cannot be written", directory.string()),
            "mend its permissions or the full disk, or set KDA_JIT_CACHE_DIR"};
  return {true, fmt::format("cache {} can be written", directory.string()), ""};
}

int doctor(bool json) {
  const auto engine = make_engine();
  if (!engine) return report_error(engine.error());
  std::vector<Finding> findings{check_cache(*engine)};
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
  sub->footer("Exit code 1 when no device can be used.");
  sub->callback([json, &exit] { exit = doctor(*json); });
}

} // namespace kda::tools
