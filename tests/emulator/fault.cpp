// Signals raised by a kernel become errors of its launch, and addresses become lines of the source.
#include "cta.h"
#include "memory.h"
#include <csignal>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <filesystem>
#include <fmt/format.h>
#include <mutex>
#include <ucontext.h>
#include <unistd.h>

namespace kda::emulator {
namespace {

thread_local Cta* guarded = nullptr;
constexpr std::array kSignals = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
std::array<struct sigaction, kSignals.size()> previous;

/// The watchdog of a worker thread: ticks of its CPU time.
struct Watch {
  const Job* job = nullptr;
  unsigned long switches = 0, progress = 0;
  int idle = 0, stuck = 0; ///< ticks since then
};
thread_local Watch watch;
constexpr int kTicks = 4, kStuckTicks = 10 * kTicks, kWatchSignal = SIGVTALRM;

std::string what(int signal, const siginfo_t& info, const ucontext_t& context) {
  if (signal == SIGILL) // __builtin_trap of -fsanitize=alignment,bounds
    return "a misaligned vector, or an index outside of an array in registers";
  if (signal == SIGFPE) return "an integer division by zero";
  const bool write = (context.uc_mcontext.gregs[REG_ERR] & 2) != 0;
  return fmt::format("a {} of {}", write ? "write" : "read", Memory::describe(info.si_addr));
}

void handle(int signal, siginfo_t* info, void* raw) {
  if (guarded == nullptr) { // not ours: as if we had never been here
    for (std::size_t i = 0; i < kSignals.size(); ++i)
      if (kSignals[i] == signal) sigaction(signal, &previous[i], nullptr);
    return;
  }
  const auto& context = *static_cast<const ucontext_t*>(raw);
  const auto* pc = reinterpret_cast<const char*>(context.uc_mcontext.gregs[REG_RIP]);
  // A fault of generated code holds no lock, so formatting here is safe; the fiber is never resumed.
  guarded->fail(fmt::format("{} by {} at {}", what(signal, *info, context), guarded->describe_current(),
                            source_place(pc + 1)));
}

void tick(int, siginfo_t*, void* raw) {
  if (guarded == nullptr) return;
  const bool switched = guarded->switches() != watch.switches, moved = guarded->progress() != watch.progress;
  watch.idle = switched ? 0 : watch.idle + 1;
  watch.stuck = moved ? 0 : watch.stuck + 1;
  watch.switches = guarded->switches();
  watch.progress = guarded->progress();
  if (watch.idle < kTicks && watch.stuck < kStuckTicks) return;
  guarded->set_overdue();
  const auto* pc =
      reinterpret_cast<const char*>(static_cast<const ucontext_t*>(raw)->uc_mcontext.gregs[REG_RIP]);
  // Elsewhere a lock may be held, and a hook does not know the kernel's line: the next switch, checked access
  // or tick finds the kernel itself.
  if (pc < watch.job->code || pc >= watch.job->code_end) return;
  if (source_place(pc + 1).find("hooks.cpp") == std::string::npos) guarded->fail_overdue(pc + 1);
}

timer_t start_timer(double seconds) {
  sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = kWatchSignal;
  event._sigev_un._tid = gettid();
  timer_t timer = nullptr;
  if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) != 0) return nullptr;
  const auto nanoseconds = static_cast<long>(seconds / kTicks * 1e9);
  const timespec step = {nanoseconds / 1000000000, nanoseconds % 1000000000};
  const itimerspec every = {step, step};
  timer_settime(timer, 0, &every, nullptr);
  return timer;
}

/// Installed before every launch: others (a test framework) may have put theirs in front.
void install() {
  static std::mutex mutex;
  const std::scoped_lock lock(mutex);
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER; // the handler leaves by switching stacks
  for (std::size_t i = 0; i < kSignals.size(); ++i) {
    struct sigaction old = {};
    sigaction(kSignals[i], &action, &old);
    if (old.sa_sigaction != handle) previous[i] = old;
  }
  action.sa_sigaction = tick;
  action.sa_flags |= SA_RESTART;
  sigaction(kWatchSignal, &action, nullptr);
}

std::string run_command(const std::string& command) {
  std::string out;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return out;
  char line[512];
  while (std::fgets(line, sizeof line, pipe) != nullptr)
    out += line;
  pclose(pipe);
  return out;
}

} // namespace

std::string source_place(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return fmt::format("{}", address);
  const auto offset = static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase) - 1;
  const std::string frames =
      run_command(fmt::format("addr2line -i -e '{}' {:#x} 2>/dev/null", info.dli_fname, offset));
  // Innermost first; the first line outside of the primitives says most, its callers follow.
  std::string place;
  for (std::size_t at = 0; at < frames.size();) {
    const std::size_t end = std::min(frames.find('\n', at), frames.size());
    // Without a "(discriminator 4)".
    const std::string frame = frames.substr(at, std::min(end, frames.find(' ', at)) - at);
    at = end + 1;
    if (frame.find("/primitives/") != std::string::npos || frame.find("??") != std::string::npos) continue;
    place += (place.empty() ? "" : " < ") + std::filesystem::path(frame).filename().string();
  }
  return place.empty() ? fmt::format("{}+{:#x}", info.dli_fname, offset) : place;
}

FaultScope::FaultScope(Cta& cta, const Job& job) : stack_(std::size_t{128} << 10) {
  guarded = &cta;
  stack_t stack = {};
  stack.ss_sp = stack_.data();
  stack.ss_size = stack_.size();
  sigaltstack(&stack, nullptr);
  install();
  watch = {&job, cta.switches(), cta.progress(), 0, 0};
  timer_ = start_timer(job.watchdog_seconds);
}

FaultScope::~FaultScope() {
  guarded = nullptr;
  if (timer_ != nullptr) timer_delete(timer_);
  stack_t stack = {};
  stack.ss_flags = SS_DISABLE;
  sigaltstack(&stack, nullptr);
}

} // namespace kda::emulator
