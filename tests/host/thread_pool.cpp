// Every item once, whatever the number of threads and callers.
#include "thread_pool.h"
#include <catch2/catch.hpp>
#include <chrono>

using kda::ThreadPool;

namespace {

/// True when one launch visits each of `items` exactly once.
bool visits_each_once(ThreadPool& pool, std::int64_t items) {
  std::vector<std::atomic<int>> visits(static_cast<std::size_t>(items));
  pool.run(items, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      ++visits[static_cast<std::size_t>(i)];
  });
  for (const auto& count : visits)
    if (count != 1) return false;
  return true;
}

} // namespace

TEST_CASE("thread pool: every item is done once, also after the workers have parked") {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (const std::int64_t items : {0, 1, 2, 7, 1000}) {
      CAPTURE(threads, items);
      CHECK(visits_each_once(pool, items));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      CHECK(visits_each_once(pool, items));
    }
  }
}

TEST_CASE("thread pool: several callers at once") {
  ThreadPool pool(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&] {
      for (int n = 0; n < 50; ++n)
        if (!visits_each_once(pool, 33)) ++wrong;
    });
  for (std::thread& caller : callers)
    caller.join();
  CHECK(wrong == 0);
}
