// A tuner's work on the device in a process of its own: what faults there spoils nothing here. A candidate
// that kills its process, breaks the device for it or hangs is marked, and the next process goes on without
// it.
#include "tune_worker.h"
#include "tuning.h"
#include <algorithm>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

namespace kda {
namespace {

/// Without a line from the worker, beyond the budget; a compile or a check takes far less.
constexpr double kSilenceSeconds = 15;

struct Outcome {
  std::string json;           ///< the report; empty when the worker ended without one
  std::string stage, variant; ///< what it was about to do last
  bool silent = false;        ///< it was killed for saying nothing
  int status = 0;             ///< as waitpid has it
};

/// A child process and the end of its stdout.
class Child {
public:
  static Result<Child> start(const std::filesystem::path& program, std::vector<std::string> arguments,
                             std::vector<std::string> environment) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0)
      return fail(ErrorCode::internal, fmt::format("no pipe to a worker: {}", std::strerror(errno)));
    const auto pointers = [](std::vector<std::string>& strings) {
      std::vector<char*> all;
      all.reserve(strings.size() + 1);
      for (std::string& s : strings)
        all.push_back(s.data());
      all.push_back(nullptr);
      return all;
    };
    arguments.insert(arguments.begin(), program.native());
    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    pid_t pid = -1;
    const int error = ::posix_spawn(&pid, program.c_str(), &actions, nullptr, pointers(arguments).data(),
                                    pointers(environment).data());
    ::posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    Child child(pid, ends[0]);
    if (error != 0) {
      child.pid_ = -1;
      return fail(ErrorCode::unavailable,
                  fmt::format("the tuner's worker '{}' does not start: {}; set tune_worker "
                              "(KDA_JIT_TUNE_WORKER) to kda-jit, or to nothing to tune in this process",
                              program.native(), std::strerror(error)));
    }
    return child;
  }
  Child(Child&& other) noexcept : pid_(std::exchange(other.pid_, -1)), out_(std::exchange(other.out_, -1)) {}
  Child& operator=(Child&&) = delete;
  ~Child() {
    kill();
    if (out_ >= 0) ::close(out_);
    if (pid_ > 0) (void)wait();
  }
  void kill() const {
    if (pid_ > 0) ::kill(pid_, SIGKILL);
  }
  int wait() {
    int status = 0;
    while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    return status;
  }
  /// Appends what there is to `text`; false at the end, or after `seconds` without anything (`silent`).
  bool read(std::string& text, double seconds, bool& silent) const {
    pollfd ready{out_, POLLIN, 0};
    int count = 0;
    do
      count = ::poll(&ready, 1, static_cast<int>(seconds * 1e3));
    while (count < 0 && errno == EINTR);
    silent = count == 0;
    if (count <= 0) return false;
    char buffer[4096];
    ssize_t got = 0;
    do
      got = ::read(out_, buffer, sizeof buffer);
    while (got < 0 && errno == EINTR);
    if (got <= 0) return false;
    text.append(buffer, static_cast<std::size_t>(got));
    return true;
  }

private:
  Child(pid_t pid, int out) : pid_(pid), out_(out) {}
  pid_t pid_;
  int out_;
};

std::vector<std::string_view> fields_of(std::string_view line) {
  std::vector<std::string_view> fields;
  for (;;) {
    const auto end = line.find('\t');
    fields.push_back(line.substr(0, end));
    if (end == line.npos) return fields;
    line.remove_prefix(end + 1);
  }
}

int number_of(std::string_view text) {
  int value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

Outcome follow(Child& child, double silence_seconds,
               const std::function<void(const TuneProgress&)>& progress) {
  Outcome outcome;
  std::string text;
  bool reporting = false;
  while (child.read(text, silence_seconds, outcome.silent))
    for (std::size_t end = 0; !reporting && (end = text.find('\n')) != text.npos; text.erase(0, end + 1)) {
      const auto fields = fields_of(std::string_view(text).substr(0, end));
      if (fields[0] == "report") {
        reporting = true;
      } else if (fields[0] == "progress" && fields.size() == 5) {
        outcome.stage = fields[1];
        outcome.variant = fields[4];
        if (progress) progress({outcome.stage, number_of(fields[2]), number_of(fields[3]), outcome.variant});
      }
    }
  if (outcome.silent) child.kill();
  outcome.status = child.wait();
  if (reporting && outcome.status == 0) outcome.json = text;
  return outcome;
}

/// Whether a signal is of the kind that a process brings upon itself: nobody kills with these.
bool crashed(int status) {
  constexpr int kCrashes[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGTRAP};
  return WIFSIGNALED(status) &&
         std::find(std::begin(kCrashes), std::end(kCrashes), WTERMSIG(status)) != std::end(kCrashes);
}

std::string end_of(const Outcome& o, double silence_seconds) {
  if (o.silent) return fmt::format("it gave no answer for {:.0f} s", silence_seconds);
  if (WIFSIGNALED(o.status))
    return fmt::format("its process was ended by signal {} ({})", WTERMSIG(o.status),
                       ::strsignal(WTERMSIG(o.status)));
  return fmt::format("its process ended with code {}", WEXITSTATUS(o.status));
}

} // namespace

std::vector<std::string> problem_arguments(const Problem& p, const Sizes& s, Device device) {
  std::vector<std::string> all;
  const auto option = [&](const char* name, const auto& value) {
    all.push_back(fmt::format("--{}={}", name, value));
  };
  option("device", to_string(device));
  option("operation", to_string(p.operation));
  option("heads", p.heads);
  option("value-heads", p.value_heads);
  option("key-dim", p.key_dim);
  option("value-dim", p.value_dim);
  option("dtype", to_string(p.dtype));
  option("gate-dtype", to_string(p.gate_dtype));
  option("beta-dtype", to_string(p.beta_dtype));
  option("state-dtype", to_string(p.state_dtype));
  option("state-layout", to_string(p.state_layout));
  option("gate", to_string(p.gate));
  option("cu-seqlens", to_string(p.cu_seqlens_type));
  option("batch", s.batch);
  option("tokens", s.tokens);
  option("sequences", s.sequences);
  option("saved-interval", p.saved_interval);
  for (const auto& [name, wanted] : {std::pair{"--dt-bias", p.dt_bias},
                                     {"--beta-sigmoid", p.beta_sigmoid},
                                     {"--beta-times-two", p.beta_times_two},
                                     {"--qk-l2norm", p.qk_l2norm},
                                     {"--varlen", p.varlen},
                                     {"--state-pool", p.state_pool},
                                     {"--every-state", p.every_state},
                                     {"--updates", p.updates},
                                     {"--tree", p.tree},
                                     {"--interior-states", p.interior_states},
                                     {"--batch-invariant", p.batch_invariant}})
    if (wanted) all.emplace_back(name);
  return all;
}

Status Tuning::measure_in_worker() {
  const EngineOptions& options = engine_->options;
  const std::filesystem::path schema = engine_->store.directory();
  const double silence = kSilenceSeconds + options.tune_budget_seconds;
  while (anything_wanted()) {
    std::vector<std::string> arguments{"tune", "--worker"};
    if (schema.empty()) arguments.emplace_back("--memory-only");
    for (std::string& a : problem_arguments(p_, s_, device_))
      arguments.push_back(std::move(a));
    for (const Contestant& c : all_) {
      if (c.wanted && c.ok()) arguments.push_back("--only=" + c.row.variant);
      if (c.barred) arguments.push_back("--never=" + c.row.variant);
    }
    auto child =
        Child::start(options.tune_worker, std::move(arguments),
                     worker_environment(options, schema.parent_path(),
                                        std::max(0.0, options.tune_budget_seconds - spent_seconds())));
    if (!child) return tl::unexpected(child.error());
    const Outcome outcome = follow(*child, silence, request_.progress);
    if (!outcome.json.empty()) {
      const auto again = take_worker_report(outcome.json);
      if (!again) return tl::unexpected(again.error());
      if (!*again) return {};
      continue;
    }
    const bool faulted = outcome.silent || crashed(outcome.status);
    const auto culprit = std::find_if(all_.begin(), all_.end(), [&](const Contestant& c) {
      return c.row.variant == outcome.variant && !c.barred;
    });
    // Compiles run side by side, so that the last one told is not the one that ended the process.
    if (!faulted || culprit == all_.end() || outcome.stage == "compiling")
      return fail(ErrorCode::internal,
                  fmt::format("the tuner's worker failed while {}: {}; its messages are on stderr",
                              outcome.stage.empty() ? "starting" : outcome.stage, end_of(outcome, silence)));
    bar(*culprit, fmt::format("{}: {}", outcome.stage, end_of(outcome, silence)));
  }
  return {};
}

void Tuning::bar(Contestant& c, const std::string& why) {
  c.out("faulted", why);
  c.barred = c.stored = true;
  c.always = false;
  engine_->warn(fmt::format("'{}' faulted, and is not run again: {}", c.row.variant, why));
}

Result<bool> Tuning::take_worker_report(const std::string& json) {
  const auto reports = parse_reports(json);
  if (!reports) return tl::unexpected(reports.error());
  const auto refuse = [](const std::string& why) {
    return fail(ErrorCode::internal, fmt::format("the tuner's worker is of another build: {}", why));
  };
  if (reports->size() != 1) return refuse(fmt::format("{} reports", reports->size()));
  const TuneReport& report = reports->front();
  for (const auto& [theirs, ours] : {std::pair{report.problem, head_.problem},
                                     {report.bucket, head_.bucket},
                                     {report.device, head_.device},
                                     {report.driver, head_.driver},
                                     {report.compiler, head_.compiler},
                                     {report.mode, head_.mode}})
    if (theirs != ours) return refuse(fmt::format("it tuned '{}', not '{}'", theirs, ours));
  std::map<std::string_view, const TuneRow*> rows;
  for (const TuneRow& row : report.rows)
    rows[row.variant] = &row;
  bool again = false;
  for (Contestant& c : all_)
    if (const auto row = rows.find(c.row.variant);
        row != rows.end() && row->second->status == "faulted" && !c.barred) {
      bar(c, row->second->reason);
      c.wanted = false;
      again = true; // what came after it did not run
    }
  if (again) return true;
  head_.floor_us = report.floor_us;
  for (Contestant& c : all_) {
    if (!c.wanted || !c.ok()) continue;
    const auto row = rows.find(c.row.variant);
    if (row == rows.end() || row->second->image != c.row.image)
      return refuse(fmt::format("it does not know '{}' as it is here", c.row.variant));
    c.row = *row->second;
  }
  return false;
}

} // namespace kda
