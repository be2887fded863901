// Threads on one store. They run under ThreadSanitizer too (test_cache_threads).
#include "atomic_file.h"
#include "cache/tuning_db.h"
#include "scratch.h"
#include <algorithm>
#include <atomic>
#include <barrier>
#include <catch2/catch.hpp>
#include <thread>

using namespace kda::cache;
using namespace kda::cache::test;
namespace fs = std::filesystem;

namespace {
constexpr int kThreads = 24;

template <class Body>
void on_threads(const Body& body) {
  std::vector<std::jthread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&body, t] { body(t); });
}
} // namespace

TEST_CASE("24 threads on distinct keys, with everything else at the same time", "[threads]") {
  const Scratch scratch;
  std::atomic<int> warnings = 0, made = 0, wrong = 0;
  Store store({.directory = scratch.path(), .warn = [&](const std::string&) { ++warnings; }});
  TuningDb db(store.directory(), [&](const std::string&) { ++warnings; });
  constexpr int kKeys = 6;
  on_threads([&](int t) {
    for (int i = 0; i < kKeys; ++i) {
      const std::string name = std::to_string(t) + "/" + std::to_string(i);
      const auto entry = store.get_or_make(key_of(name), [&] {
        ++made;
        return entry_of(name);
      });
      wrong += entry && entry->payload == name ? 0 : 1;
      wrong += store.get_or_make(key_of(name), never_made) == entry ? 0 : 1;
      TuningRow row;
      row.problem = name;
      wrong += db.put({row}) && db.rows(name).size() == 1 ? 0 : 1;
      if (t == 0) (void)store.stats();
      if (t == 1) wrong += static_cast<int>(store.verify(false).bad.size());
      if (t == 2) store.discard(key_of(name), "refused by the loader");
    }
  });
  CHECK(wrong == 0);
  CHECK(made == kThreads * kKeys);
  CHECK(warnings == kKeys); // the discards
  CHECK(store.stats().entries == (kThreads - 1) * kKeys);
  CHECK(db.rows().size() == kThreads * kKeys);
}

TEST_CASE("24 threads on one key share one make, and all have its entry", "[threads]") {
  const Scratch scratch;
  Store store({.directory = scratch.path()});
  constexpr int kKeys = 20;
  std::barrier start(kThreads);
  std::atomic<int> made = 0;
  std::vector<std::vector<std::shared_ptr<const Entry>>> seen(kKeys);
  for (auto& entries : seen)
    entries.resize(kThreads);
  on_threads([&](int t) {
    for (std::size_t key = 0; key < kKeys; ++key) {
      start.arrive_and_wait();
      seen[key][static_cast<std::size_t>(t)] = store.get_or_make(key_of(std::to_string(key)), [&] {
        ++made;
        return entry_of(std::to_string(key));
      });
    }
  });
  CHECK(made == kKeys);
  for (std::size_t key = 0; key < kKeys; ++key) {
    REQUIRE(seen[key][0]);
    CHECK(seen[key][0]->payload == std::to_string(key));
    CHECK(std::count(seen[key].begin(), seen[key].end(), seen[key][0]) == kThreads);
  }
}

TEST_CASE("temporary files of threads never share a name", "[threads]") {
  const Scratch scratch;
  constexpr int kFiles = 40;
  std::atomic<int> failed = 0;
  std::int64_t most = 0;
  std::barrier all_open(kThreads,
                        [&]() noexcept { most = std::distance(fs::directory_iterator(scratch.path()), {}); });
  on_threads([&](int) {
    std::vector<AtomicFile> files;
    for (int i = 0; i < kFiles; ++i) {
      auto file = AtomicFile::create(scratch.path() / "target");
      failed += file ? 0 : 1;
      if (file) files.push_back(*std::move(file));
    }
    all_open.arrive_and_wait(); // nobody removes his before they are counted
  });
  CHECK(failed == 0);
  CHECK(most == kThreads * kFiles);
  CHECK(fs::is_empty(scratch.path())); // without commit they are gone
}
