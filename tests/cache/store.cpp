// The store as its users see it: one make per key, hits from memory, disk and read-only directories.
#include "scratch.h"
#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

using namespace kda::cache;
using namespace kda::cache::test;
namespace fs = std::filesystem;

TEST_CASE("an entry is made once, then comes from memory, and in a new store from disk", "[store]") {
  const Scratch scratch;
  const KeyManifest key = key_of("a");
  Source source = Source::memory;
  {
    Store store({.directory = scratch.path()});
    CHECK_FALSE(store.get(key));
    auto entry = store.get_or_make(
        key, [] { return entry_of("image"); }, &source);
    REQUIRE(entry);
    CHECK(source == Source::made);
    CHECK(entry->payload == "image");
    entry = store.get_or_make(key, never_made, &source);
    REQUIRE(entry);
    CHECK(source == Source::memory);
    const StoreStats stats = store.stats();
    CHECK(stats.entries == 1);
    CHECK(stats.bytes == static_cast<std::int64_t>(fs::file_size(file_of(scratch.path(), key))));
    CHECK(stats.misses == 2);
    CHECK(stats.memory_hits == 1);
  }
  Store store({.directory = scratch.path()});
  const auto entry = store.get_or_make(key, never_made, &source);
  REQUIRE(entry);
  CHECK(source == Source::disk);
  CHECK(entry->payload == "image");
  CHECK(entry->metadata == entry_of("").metadata);
  CHECK(store.stats().disk_hits == 1);
  CHECK(store.directory() == scratch.path() / "v1");
}

TEST_CASE("without a directory everything works in memory", "[store]") {
  Store store({});
  CHECK(store.directory().empty());
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("image"); }));
  Source source = Source::made;
  CHECK(store.get_or_make(key_of("a"), never_made, &source)->payload == "image");
  CHECK(source == Source::memory);
  CHECK(store.stats().entries == 0);
  CHECK(store.verify(false).good == 0);
}

TEST_CASE("threads that want the same key share one make", "[store]") {
  const Scratch scratch;
  // Without a directory there is no lock file that could do the work of the threads' own turn.
  Store store({.directory = GENERATE(true, false) ? scratch.path() : fs::path()});
  std::atomic<int> made = 0;
  std::atomic<int> right = 0;
  std::vector<std::jthread> threads;
  threads.reserve(16);
  for (int i = 0; i < 16; ++i)
    threads.emplace_back([&] {
      const auto entry = store.get_or_make(key_of("slow"), [&] {
        ++made;
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        return entry_of("image");
      });
      right += entry && entry->payload == "image" ? 1 : 0;
    });
  threads.clear();
  CHECK(made == 1);
  CHECK(right == 16);
}

TEST_CASE("different keys are made at the same time", "[store]") {
  Store store({});
  std::atomic<int> inside = 0;
  std::atomic<bool> met = false;
  const auto make = [&] {
    ++inside;
    for (int i = 0; i < 2000 && inside < 2; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    met = inside == 2;
    return entry_of("image");
  };
  std::jthread other([&] { (void)store.get_or_make(key_of("b"), make); });
  (void)store.get_or_make(key_of("a"), make);
  other.join();
  CHECK(met);
}

TEST_CASE("a make that fails is run by each waiter and leaves nothing behind", "[store]") {
  const Scratch scratch;
  Store store({.directory = scratch.path()});
  std::atomic<int> made = 0, null = 0;
  std::vector<std::jthread> threads;
  threads.reserve(4);
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      null += store.get_or_make(key_of("bad"), [&]() -> std::optional<Entry> {
        ++made;
        return std::nullopt;
      }) == nullptr;
    });
  threads.clear();
  CHECK(made == 4);
  CHECK(null == 4);
  CHECK(store.stats().entries == 0);
  CHECK(store.get_or_make(key_of("bad"), [] { return entry_of("mended"); })->payload == "mended");
}

TEST_CASE("a make that throws frees its key", "[store]") {
  Store store({});
  CHECK_THROWS(store.get_or_make(key_of("a"), never_made));
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("image"); }));
}
