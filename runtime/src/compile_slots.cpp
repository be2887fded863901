#include "compile_slots.h"
#include <algorithm>
#include <fstream>
#include <limits>
#include <string>
#include <thread>

namespace kda {
namespace fs = std::filesystem;
namespace {

constexpr std::uint64_t kNoLimit = std::numeric_limits<std::uint64_t>::max();

/// The number behind the first word `name` of a file, or at its start where `name` is empty; `otherwise`
/// where there is none: "max" is none.
std::uint64_t number_in(const fs::path& file, std::string_view name, std::uint64_t otherwise) {
  std::ifstream in(file);
  std::string word;
  if (!name.empty())
    while (in >> word && word != name) {
    }
  std::uint64_t value = 0;
  return in >> value ? value : otherwise;
}

/// What one control group leaves. Its page cache that nobody uses is given back on demand and counts as free.
std::uint64_t left_in(const fs::path& group, const char* limit_name, const char* used_name,
                      const char* cache) {
  const std::uint64_t limit = number_in(group / limit_name, "", kNoLimit);
  const std::uint64_t used = number_in(group / used_name, "", 0);
  const std::uint64_t idle = std::min(number_in(group / "memory.stat", cache, 0), used);
  if (limit == kNoLimit) return kNoLimit;
  return limit - std::min(limit, used - idle);
}

} // namespace

std::uint64_t available_memory(const fs::path& root) {
  const std::uint64_t kilobytes = number_in(root / "proc/meminfo", "MemAvailable:", kNoLimit / 1024);
  std::uint64_t least = kilobytes * 1024;
  // Version 2 has one line, "0::/path"; in a container the path is often "/" and the limit stands there.
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const bool unified = line.substr(0, 3) == "0::", first = line.find(":memory:") != std::string::npos;
    if (!unified && !first) continue;
    const fs::path top = root / (unified ? "sys/fs/cgroup" : "sys/fs/cgroup/memory");
    // Every group from the process's own up to the top limits it.
    for (fs::path path = line.substr(line.rfind(':') + 1);; path = path.parent_path()) {
      const fs::path group = top / path.relative_path();
      least = std::min(least, unified ? left_in(group, "memory.max", "memory.current", "inactive_file")
                                      : left_in(group, "memory.limit_in_bytes", "memory.usage_in_bytes",
                                                "total_inactive_file"));
      if (!path.has_relative_path()) break;
    }
  }
  return least;
}

CompileSlots::CompileSlots(int threads, std::function<std::uint64_t()> available)
    : threads_(threads > 0 ? threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()))),
      available_(std::move(available)) {}

bool CompileSlots::admits() const {
  // Those that run may have taken nothing yet.
  const auto all = static_cast<std::uint64_t>(running_) + 1;
  return running_ == 0 || (running_ < threads_ && available_() / kBytesPerCompile >= all);
}

CompileSlots::Slot::Slot(CompileSlots& slots) : slots_(slots) {
  std::unique_lock lock(slots_.mutex_);
  slots_.free_.wait(lock, [&] { return slots_.admits(); });
  ++slots_.running_;
}

CompileSlots::Slot::~Slot() {
  {
    const std::scoped_lock lock(slots_.mutex_);
    --slots_.running_;
  }
  slots_.free_.notify_all();
}

} // namespace kda
