#pragma once
// What a tuner hands to the process that works for it, `kda-jit tune --worker`, and the lines that it reads
// from that one's stdout: one a step, before the step, then the report.
//   progress<TAB>stage<TAB>done<TAB>total<TAB>variant
//   report
//   { the JSON of write_reports, to the end }
#include "kda/engine.h"

namespace kda {

/// The options of `kda-jit` that name a problem, its sizes and a device.
[[nodiscard]] std::vector<std::string> problem_arguments(const Problem&, const Sizes&, Device);
/// The variables that EngineOptions::from_environment makes these options of, as NAME=value: those of a
/// worker, which tunes in its own process. `cache` is the directory in use, `budget_seconds` what is left.
[[nodiscard]] std::vector<std::string>
worker_environment(const EngineOptions&, const std::filesystem::path& cache, double budget_seconds);

} // namespace kda
