#pragma once
// What the sub-commands share: registration, exit codes, engine creation, tables and progress.
#include "kda/engine.h"
#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace kda::tools {

/// Exit codes: 0 the work was done, 1 it was tried and failed, 2 the command line or an input is wrong
/// (nothing was written).
enum Exit : int { kOk = 0, kFailed = 1, kUsage = 2 };

/// One function a sub-command, in the file of its name. It registers options and a callback that sets `exit`.
void add_cache(CLI::App& app, int& exit);
void add_check(CLI::App& app, int& exit);
void add_doctor(CLI::App& app, int& exit);
void add_env(CLI::App& app, int& exit);
void add_precompile(CLI::App& app, int& exit);
void add_report(CLI::App& app, int& exit);
void add_run(CLI::App& app, int& exit);
void add_sample(CLI::App& app, int& exit);
void add_tune(CLI::App& app, int& exit);

/// Prints "kda-jit: message" and the context to stderr; the exit code that belongs to it.
int report_error(const Error& error);
/// An engine with the options of the environment.
[[nodiscard]] Result<Engine> make_engine();
/// The same, with the emulator where this build has it.
[[nodiscard]] Result<Engine> make_engine_with_emulator();

/// Rows of text in aligned columns on stdout; the first row is the heading. Columns listed in `right` are
/// right-aligned.
void print_table(const std::vector<std::vector<std::string>>& rows,
                 const std::vector<std::size_t>& right = {});

/// "what 12/40 text" on stderr: one line rewritten on a terminal, a line every tenth of the work elsewhere.
class Progress {
public:
  Progress(std::string what, std::int64_t total);
  void step(std::string_view text);
  /// Step number `done`, of steps that may be left out or come twice.
  void at(std::int64_t done, std::string_view text);

private:
  std::string what_;
  std::int64_t total_, done_ = 0, shown_ = 0;
};

} // namespace kda::tools
