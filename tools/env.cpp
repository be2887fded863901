// kda-jit env: the variables that the library reads, once, when an engine is made from the environment.
#include "command.h"
#include <cstdlib>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace kda::tools {
namespace {

int env(bool strict, bool json) {
  if (const auto options = EngineOptions::from_environment(strict); !options)
    return report_error(options.error());
  nlohmann::json out = nlohmann::json::array();
  std::vector<std::vector<std::string>> table{{"variable", "value", "meaning"}};
  for (const EnvironmentVariable& v : environment_variables()) {
    const char* const value =
        std::getenv(v.name); // NOLINT(concurrency-mt-unsafe): no thread writes the environment
    out.push_back({{"name", v.name}, {"value", value == nullptr ? "" : value}, {"meaning", v.meaning}});
    table.push_back({v.name, value == nullptr ? "-" : value, v.meaning});
  }
  if (json)
    fmt::print("{}\n", nlohmann::json{{"schema", 1}, {"variables", out}}.dump(1));
  else
    print_table(table);
  return kOk;
}

} // namespace

void add_env(CLI::App& app, int& exit) {
  auto* const sub =
      app.add_subcommand("env", "List the environment variables that are read, and their values");
  auto strict = std::make_shared<bool>(false);
  auto json = std::make_shared<bool>(false);
  sub->add_flag("--strict", *strict, "refuse KDA_JIT_ variables that are not known (exit code 2)");
  sub->add_flag("--json", *json, "JSON on stdout");
  sub->callback([strict, json, &exit] { exit = env(*strict, *json); });
}

} // namespace kda::tools
