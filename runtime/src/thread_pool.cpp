#include "thread_pool.h"
#include <algorithm>

namespace kda {
namespace {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

/// Returns once `value` is no longer `old`: spins for some 20 us, then sleeps in the kernel.
void wait_while(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
  constexpr int kSpins = 500;
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  value.wait(old, std::memory_order_acquire);
}

} // namespace

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; ++i)
    workers_.emplace_back([this] { serve(); });
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_)
    worker.join();
}

void ThreadPool::run(std::int64_t items, const Work& work) {
  if (items <= 0) return;
  std::unique_lock lock(owner_, std::try_to_lock);
  if (items == 1 || workers_.empty() || !lock) return work(0, items);
  work_ = &work;
  items_ = items;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<std::uint32_t>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  take_items();
  for (std::uint32_t left = busy_.load(std::memory_order_acquire); left != 0;
       left = busy_.load(std::memory_order_acquire))
    wait_while(busy_, left);
}

void ThreadPool::take_items() {
  // Some parts a thread: sequences differ in length, so equal shares would not be equal work.
  const auto threads = static_cast<std::int64_t>(workers_.size()) + 1;
  const std::int64_t part = std::max<std::int64_t>(1, items_ / (8 * threads));
  for (std::int64_t begin = next_.fetch_add(part); begin < items_; begin = next_.fetch_add(part))
    (*work_)(begin, std::min(begin + part, items_));
}

void ThreadPool::serve() {
  for (std::uint32_t seen = 0;;) {
    wait_while(generation_, seen);
    ++seen; // a launch ends only when every worker has served it, so none is missed
    if (stop_) return;
    take_items();
    busy_.fetch_sub(1, std::memory_order_acq_rel);
    busy_.notify_all();
  }
}

} // namespace kda
