#pragma once
// Threads for the items of one host launch. A launch is often tens of microseconds, so workers spin briefly
// for the next one before they park.
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace kda {

class ThreadPool {
public:
  using Work = std::function<void(std::int64_t begin, std::int64_t end)>;

  /// `threads` counts the caller of `run`: one fewer is started. At least 1.
  explicit ThreadPool(int threads);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  /// Calls `work` on disjoint parts of [0, items) and returns when all are done; `work` must neither throw
  /// nor call `run`. The caller takes part. From several threads: one has the workers, the others do their
  /// items themselves.
  void run(std::int64_t items, const Work& work);

private:
  void serve();
  void take_items();

  std::vector<std::thread> workers_;
  std::mutex owner_; ///< held by the caller that has the workers
  const Work* work_ = nullptr;
  std::int64_t items_ = 0;
  std::atomic<std::int64_t> next_{0};
  std::atomic<std::uint32_t> generation_{0}; ///< rises with every launch
  std::atomic<std::uint32_t> busy_{0};       ///< workers that have not finished the launch
  std::atomic<bool> stop_{false};
};

} // namespace kda
