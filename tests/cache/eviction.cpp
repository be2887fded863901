// The size limit: it holds whatever the file system does with times of access, and what is in use stays.
#include "eviction.h"
#include "file_lock.h"
#include "hash.h"
#include "scratch.h"
#include <catch2/catch.hpp>
#include <limits>
#include <map>
#include <sys/stat.h>

using namespace kda::cache;
using namespace kda::cache::test;
using namespace std::chrono_literals;
namespace fs = std::filesystem;

namespace {

constexpr std::uint64_t kMega = 1U << 20U;

std::string name_of(int number) {
  return "kernel " + std::to_string(number);
}
fs::path path_of(const Scratch& scratch, int number) {
  return file_of(scratch.path(), key_of(name_of(number)));
}
/// As if the entry had last been used then.
void used(const Scratch& scratch, int number, std::chrono::minutes ago) {
  fs::last_write_time(path_of(scratch, number), fs::file_time_type::clock::now() - ago);
}
/// `count` entries of some 100 kB; the first was used an hour ago, each later one a minute later.
void fill(const Scratch& scratch, int count) {
  Store store({.directory = scratch.path()});
  for (int i = 0; i < count; ++i) {
    (void)store.get_or_make(key_of(name_of(i)), [] { return entry_of(std::string(100000, 'x')); });
    used(scratch, i, 60min - std::chrono::minutes(i));
  }
}
std::uint64_t bytes_on_disk(const Scratch& scratch) {
  std::uint64_t bytes = 0;
  for (const auto& file : fs::recursive_directory_iterator(scratch.path())) {
    struct stat status = {};
    if (file.path().extension() == ".kda" && ::stat(file.path().c_str(), &status) == 0)
      bytes += static_cast<std::uint64_t>(status.st_blocks) * 512;
  }
  return bytes;
}

} // namespace

TEST_CASE("a publish beyond the limit removes what was used longest ago", "[eviction]") {
  const Scratch scratch;
  fill(scratch, 20);
  Store store({.directory = scratch.path(), .max_bytes = kMega});
  CHECK(store.stats().entries == 20); // looking at a cache removes nothing
  (void)store.get_or_make(key_of("new"), [] { return entry_of("new"); });
  CHECK(bytes_on_disk(scratch) <= kMega);
  CHECK(bytes_on_disk(scratch) > kMega * 3 / 4); // not more than needed
  const auto left = store.stats().entries;
  for (int i = 0; i < 20; ++i)
    CHECK(fs::exists(path_of(scratch, i)) == (i >= 20 - (left - 1)));
  CHECK(fs::exists(file_of(scratch.path(), key_of("new"))));
}

TEST_CASE("the limit holds while one store publishes many", "[eviction]") {
  const Scratch scratch;
  Store store({.directory = scratch.path(), .max_bytes = kMega});
  for (int i = 0; i < 60; ++i) {
    (void)store.get_or_make(key_of(name_of(i)), [] { return entry_of(std::string(50000, 'x')); });
    used(scratch, i, 60min - std::chrono::minutes(i / 2));
    REQUIRE(bytes_on_disk(scratch) <= kMega + kMega / 16);
  }
  CHECK(store.get_or_make(key_of(name_of(0)), never_made)); // removed from the disk, not from memory
}

TEST_CASE("a hit counts as a use, and is noted without times of access", "[eviction]") {
  const Scratch scratch;
  fill(scratch, 20);
  REQUIRE(Store({.directory = scratch.path()}).get(key_of(name_of(0)))); // the oldest
  Store store({.directory = scratch.path(), .max_bytes = kMega});
  (void)store.get_or_make(key_of("new"), [] { return entry_of("new"); });
  CHECK(fs::exists(path_of(scratch, 0)));
  CHECK_FALSE(fs::exists(path_of(scratch, 1)));
}

TEST_CASE("a hit within a minute of the last one writes nothing", "[eviction]") {
  const Scratch scratch;
  fill(scratch, 1);
  used(scratch, 0, 0min);
  const auto before = fs::last_write_time(path_of(scratch, 0));
  REQUIRE(Store({.directory = scratch.path()}).get(key_of(name_of(0))));
  CHECK(fs::last_write_time(path_of(scratch, 0)) == before);
}

TEST_CASE("what is in use or just written stays, whatever the limit", "[eviction]") {
  const Scratch scratch;
  fill(scratch, 5);
  used(scratch, 2, 5min);   // and perhaps four minutes ago, which would not have been noted
  used(scratch, 3, -60min); // the clock of another machine is ahead
  Store store({.directory = scratch.path(), .max_bytes = 1});
  (void)store.get_or_make(key_of("new"), [] { return entry_of("new"); });
  for (int i = 0; i < 5; ++i)
    CHECK(fs::exists(path_of(scratch, i)) == (i == 2 || i == 3));
  CHECK(fs::exists(file_of(scratch.path(), key_of("new"))));
}

TEST_CASE("limits from nothing to everything", "[eviction]") {
  const Scratch scratch;
  fill(scratch, 3);
  for (const std::uint64_t none :
       {std::uint64_t{0}, std::uint64_t{1} << 63U, std::numeric_limits<std::uint64_t>::max()}) {
    Store store({.directory = scratch.path(), .max_bytes = none});
    (void)store.get_or_make(key_of(std::to_string(none)), [] { return entry_of("new"); });
    CHECK(store.prune(none).removed == 0);
  }
  CHECK(Store({.directory = scratch.path()}).stats().entries == 6);
}

TEST_CASE("prune brings a cache under another limit and says what it did", "[eviction]") {
  const Scratch scratch;
  fill(scratch, 10);
  Store store({.directory = scratch.path()});
  const std::uint64_t before = bytes_on_disk(scratch);
  const PruneReport report = store.prune(kMega / 2);
  CHECK(report.removed > 4);
  CHECK(report.bytes == bytes_on_disk(scratch));
  CHECK(report.bytes <= kMega / 2);
  CHECK(report.freed == before - report.bytes);
  CHECK(store.prune(kMega / 2).removed == 0);
}

TEST_CASE("the first publish of a store removes what killed writers left behind", "[eviction]") {
  const Scratch scratch;
  fill(scratch, 1);
  const fs::path young = path_of(scratch, 0).native() + ".1.tmp",
                 old = path_of(scratch, 0).native() + ".2.tmp";
  spill(young, "half");
  spill(old, "half");
  fs::last_write_time(old, fs::file_time_type::clock::now() - 2h);
  Store store({.directory = scratch.path()});
  (void)store.get_or_make(key_of("new"), [] { return entry_of("new"); });
  CHECK(fs::exists(young)); // perhaps a write in progress
  CHECK_FALSE(fs::exists(old));
}

TEST_CASE("one evicts at a time", "[eviction]") {
  const Scratch scratch;
  fill(scratch, 10);
  const Folder folder(scratch.path());
  {
    const auto other = FileLock::acquire(folder.lock_file(), hex_digest("eviction"), 0);
    REQUIRE(other);
    CHECK(evict(folder, 1).removed == 0);
  }
  CHECK(evict(folder, 1).removed == 10);
}

TEST_CASE("a hundred thousand entries: a look-up opens one file of a small folder", "[eviction]") {
  const Scratch scratch(fast_directory());
  const Folder folder(scratch.path());
  constexpr int kEntries = 100000;
  for (int x = 0; x < 256; ++x)
    fs::create_directories(folder.entry_file(fmt::format("{:02x}", x)).parent_path());
  for (int i = 0; i < kEntries; ++i)
    spill(folder.entry_file(hex_digest(name_of(i))), "");
  std::map<fs::path, int> sizes;
  for (const fs::path& entry : folder.list().entries)
    ++sizes[entry.parent_path()];
  CHECK(sizes.size() == 256);
  for (const auto& [directory, files] : sizes)
    CHECK(files < 600); // 391 on average
  Store store({.directory = scratch.path(), .max_bytes = kMega});
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("image"); }));
  CHECK(store.stats().entries == kEntries + 1);
}
