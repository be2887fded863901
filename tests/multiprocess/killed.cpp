// A process killed at any moment of a make, a publish or a write of tuning rows costs the next one nothing:
// it starts at once, finds everything that was committed, and nothing that was not.
#include "cache/tuning_db.h"
#include "process.h"
#include "scratch.h"
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <ctime>
#include <random>
#include <thread>

using namespace kda::cache;
using namespace kda::cache::test;
namespace fs = std::filesystem;

namespace {

/// What the victims have committed, as they say themselves right after each commit.
struct Committed {
  std::atomic<int> entries = 0, rows = 0;
};

std::string name_of(int number) {
  return "kernel " + std::to_string(number);
}
/// Some pages, different ones a kernel, so that a write takes several moments.
std::string image_of(int number) {
  return std::string(60000 + static_cast<std::size_t>(number % 7) * 3000,
                     static_cast<char>('a' + number % 26));
}

/// That this process has used: what else the machine does is not in it.
double processor_seconds() {
  timespec now = {};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

long temporaries_in(const fs::path& directory) {
  const fs::recursive_directory_iterator all(directory);
  return std::count_if(begin(all), end(all),
                       [](const auto& file) { return file.path().extension() == ".tmp"; });
}

/// Makes kernels and writes rows until it is killed, from the first that is not committed.
[[noreturn]] void work(const fs::path& cache, Committed& committed) {
  Store store({.directory = cache});
  TuningDb db(store.directory(), nullptr);
  for (;;) {
    const int number = committed.entries;
    (void)store.get_or_make(key_of(name_of(number)), [&] {
      std::this_thread::sleep_for(std::chrono::microseconds(300)); // the compile
      return entry_of(image_of(number));
    });
    committed.entries = number + 1;
    TuningRow row;
    row.problem = "forward";
    row.variant = name_of(committed.rows);
    if (db.put({row})) committed.rows = committed.rows + 1;
  }
}

} // namespace

TEST_CASE("processes killed at random moments lose nothing that was committed", "[multiprocess]") {
  // A write is a small part of a victim's life on some machines; then it takes more victims to hit one.
  constexpr int kKills = 1000, kMostKills = 5000;
  const Scratch scratch(fast_directory());
  const SharedMemory<Committed> committed;
  std::mt19937 random(7);
  double slowest = 0;     // of the next starts, in the processor's time
  unsigned window = 5000; // microseconds: the start and the first few kernels
  int warnings = 0, lost_entries = 0, lost_rows = 0;
  const auto go_on = [&](int kills) {
    return kills < kKills || (kills < kMostKills && temporaries_in(scratch.path()) == 0);
  };
  for (int kills = 0; go_on(kills); ++kills) {
    const int first = committed->entries;
    {
      Process victim([&]() -> int { work(scratch.path(), *committed.operator->()); });
      std::this_thread::sleep_for(std::chrono::microseconds(random() % window));
    }                                                          // SIGKILL
    if (committed->entries < kills / 2) window += window / 50; // this machine is slower
    const double start = processor_seconds();
    const int last = committed->entries, rows = committed->rows;
    // Without patience: it says so when a lock of the dead would have to be waited for.
    Store store({.directory = scratch.path(),
                 .warn = [&](const std::string&) { ++warnings; },
                 .lock_wait_seconds = 0});
    TuningDb db(store.directory(), [&](const std::string&) { ++warnings; });
    for (int i = std::max(0, first - 1); i < last; ++i) {
      const auto entry = store.get(key_of(name_of(i)));
      lost_entries += entry && entry->payload == image_of(i) ? 0 : 1;
    }
    lost_rows += static_cast<int>(db.rows("forward").size()) >= rows ? 0 : 1;
    // The key that the victim was at: neither a lock nor half a file stands in the way.
    const auto next = store.get_or_make(key_of(name_of(last)), [&] { return entry_of(image_of(last)); });
    lost_entries += next->payload == image_of(last) ? 0 : 1;
    slowest = std::max(slowest, processor_seconds() - start);
  }
  CHECK(slowest < 1);
  CHECK(warnings == 0);
  CHECK(lost_entries == 0);
  CHECK(lost_rows == 0);
  // The moments were spread: victims committed, and some died within a write.
  CHECK(committed->entries > kKills / 4);
  CHECK(committed->rows > kKills / 4);
  CHECK(temporaries_in(scratch.path()) > 0);
  Store store({.directory = scratch.path()});
  const VerifyReport report = store.verify(false);
  CHECK(report.bad.empty());
  CHECK(report.good >= committed->entries);
}
