// kda-jit: one binary, a file per sub-command. To add one: write add_<name> in tools/<name>.cpp, declare it
// in command.h, call it here.
#include "command.h"
#include <exception>
#include <fmt/format.h>

int main(int argc, char** argv) {
  using namespace kda::tools;
  CLI::App app{"Generates, compiles, caches, tunes and runs kernels for Kimi Delta Attention.", "kda-jit"};
  app.require_subcommand(1);
  app.set_help_all_flag("--help-all", "Help of every sub-command");
  app.footer("Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 failed, 2 wrong "
             "use or bad "
             "input.\nThe environment variables are listed by `kda-jit env`.");
  int exit = kOk;
  add_sample(app, exit);
  add_run(app, exit);
  add_check(app, exit);
  add_precompile(app, exit);
  add_tune(app, exit);
  add_report(app, exit);
  add_cache(app, exit);
  add_doctor(app, exit);
  add_env(app, exit);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kOk : kUsage;
  } catch (const std::exception& error) {
    fmt::print(stderr, "kda-jit: {}\n", error.what());
    return kFailed;
  }
  return exit;
}
