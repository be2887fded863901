#pragma once
// How many compiles run at a time: as many as there are threads, fewer where memory is short, always one.
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <mutex>

namespace kda {

/// Bytes that this process may still take: what the system has, within the limits of its control groups.
/// `root` stands for "/" in tests. The largest number where nothing can be read.
[[nodiscard]] std::uint64_t available_memory(const std::filesystem::path& root = "/");

class CompileSlots {
public:
  /// NVRTC 13.0 takes 60 to 80 MB for a kernel of ours; three times that.
  static constexpr std::uint64_t kBytesPerCompile = std::uint64_t{256} << 20U;

  /// `threads`: 0: those of the machine.
  explicit CompileSlots(
      int threads, std::function<std::uint64_t()> available = [] { return available_memory(); });

  /// While it lives, one compile more runs; the constructor waits until it may.
  class Slot {
  public:
    explicit Slot(CompileSlots& slots);
    Slot(const Slot&) = delete;
    Slot& operator=(const Slot&) = delete;
    ~Slot();

  private:
    CompileSlots& slots_;
  };

private:
  [[nodiscard]] bool admits() const;

  int threads_;
  std::function<std::uint64_t()> available_;
  std::mutex mutex_;
  std::condition_variable free_;
  int running_ = 0;
};

} // namespace kda
