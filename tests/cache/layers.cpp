// Damaged, foreign and refused entries; read-only directories; verify and clear.
#include "entry.h"
#include "scratch.h"
#include <catch2/catch.hpp>

using namespace kda::cache;
using namespace kda::cache::test;
namespace fs = std::filesystem;

/// Puts one entry on disk and returns its file.
static fs::path seed(const fs::path& directory, const KeyManifest& key, const std::string& payload) {
  Store store({.directory = directory});
  (void)store.get_or_make(key, [&] { return entry_of(payload); });
  return file_of(directory, key);
}

TEST_CASE("a damaged entry is a miss and one warning, and is replaced", "[store]") {
  const Scratch scratch;
  const KeyManifest key = key_of("a");
  const fs::path file = seed(scratch.path(), key, "image");
  const std::string good = slurp(file);
  std::string flipped = good;
  flipped[good.size() / 2] ^= 4;
  const std::string damaged =
      GENERATE_REF(std::string(), good.substr(0, good.size() / 2), good.substr(0, good.size() - 1), flipped,
                   std::string("\x7f"
                               "ELF"),
                   std::string(4096, '\0'));
  spill(file, damaged);

  std::vector<std::string> warnings;
  Store store(
      {.directory = scratch.path(), .warn = [&](const std::string& text) { warnings.push_back(text); }});
  CHECK_FALSE(store.get(key));
  Source source = Source::disk;
  const auto entry = store.get_or_make(
      key, [] { return entry_of("made anew"); }, &source);
  REQUIRE(entry);
  CHECK(source == Source::made);
  CHECK(entry->payload == "made anew");
  REQUIRE(warnings.size() == 1);
  CHECK(warnings[0].find(file.native()) != std::string::npos);
  CHECK(store.stats().corrupt == 1);
  CHECK(decode(slurp(file)));
  CHECK(Store({.directory = scratch.path()}).get(key)->payload == "made anew");
}

TEST_CASE("an entry of another key under this key's name is a miss", "[store]") {
  const Scratch scratch;
  const fs::path mine = seed(scratch.path(), key_of("mine"), "mine");
  const fs::path other = seed(scratch.path(), key_of("other"), "other");
  fs::copy_file(other, mine, fs::copy_options::overwrite_existing);
  std::vector<std::string> warnings;
  Store store(
      {.directory = scratch.path(), .warn = [&](const std::string& text) { warnings.push_back(text); }});
  CHECK_FALSE(store.get(key_of("mine")));
  REQUIRE(warnings.size() == 1);
  CHECK(warnings[0].find("another key") != std::string::npos);
  CHECK(store.get_or_make(key_of("mine"), [] { return entry_of("mine"); })->payload == "mine");
}

TEST_CASE("an entry of another format version is a miss", "[store]") {
  const Scratch scratch;
  const fs::path file = seed(scratch.path(), key_of("a"), "image");
  std::string bytes = slurp(file);
  bytes[8] = 2;
  spill(file, bytes);
  CHECK_FALSE(Store({.directory = scratch.path()}).get(key_of("a")));
}

TEST_CASE("anything but a file under an entry's name is a miss", "[store]") {
  const Scratch scratch;
  const KeyManifest key = key_of("a");
  fs::create_directories(file_of(scratch.path(), key));
  Store store({.directory = scratch.path()});
  CHECK_FALSE(store.get(key));
  CHECK(store.get_or_make(key, [] { return entry_of("image"); })->payload == "image");
}

TEST_CASE("a read-only directory is read after the user's and never written", "[store]") {
  const Scratch scratch;
  const fs::path shipped = scratch.path() / "shipped", user = scratch.path() / "user";
  seed(shipped, key_of("a"), "shipped a");
  seed(shipped, key_of("b"), "shipped b");
  seed(user, key_of("b"), "own b");
  Store store({.directory = user, .read_only = {scratch.path() / "missing", shipped}});
  Source source = Source::made;
  CHECK(store.get_or_make(key_of("a"), never_made, &source)->payload == "shipped a");
  CHECK(source == Source::read_only);
  CHECK(store.get_or_make(key_of("b"), never_made, &source)->payload == "own b");
  CHECK(source == Source::disk);
  CHECK(store.stats().read_only_hits == 1);
  (void)store.get_or_make(key_of("c"), [] { return entry_of("new"); });
  CHECK(store.stats().entries == 2); // b and c: a hit is not copied
  CHECK(Store({.directory = shipped}).stats().entries == 2);
}

TEST_CASE("a read-only directory serves without a user directory", "[store]") {
  const Scratch scratch;
  seed(scratch.path(), key_of("a"), "shipped");
  Store store({.read_only = {scratch.path()}});
  CHECK(store.get_or_make(key_of("a"), never_made)->payload == "shipped");
}

TEST_CASE("a discarded entry is not read again, wherever it came from", "[store]") {
  const Scratch scratch;
  const fs::path shipped = scratch.path() / "shipped", user = scratch.path() / "user";
  const bool from_shipped = GENERATE(true, false);
  seed(from_shipped ? shipped : user, key_of("a"), "refused by the driver");
  std::vector<std::string> warnings;
  Store store({.directory = user, .read_only = {shipped}, .warn = [&](const std::string& text) {
                 warnings.push_back(text);
               }});
  REQUIRE(store.get(key_of("a")));
  store.discard(key_of("a"), "error 209");
  REQUIRE(warnings.size() == 1);
  CHECK(warnings[0].find("error 209") != std::string::npos);
  CHECK_FALSE(store.get(key_of("a")));
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("fresh"); })->payload == "fresh");
  Store next({.directory = user, .read_only = {shipped}});
  CHECK(next.get_or_make(key_of("a"), never_made)->payload == "fresh");
}

TEST_CASE("verify reports what is wrong with each file and removes it when asked", "[store]") {
  const Scratch scratch;
  const fs::path cut = seed(scratch.path(), key_of("cut"), "image");
  const fs::path moved = seed(scratch.path(), key_of("moved"), "image");
  seed(scratch.path(), key_of("good"), "image");
  spill(cut, slurp(cut).substr(0, 100));
  fs::rename(moved, moved.parent_path() / ("0" + moved.filename().native()));
  const fs::path young = cut.parent_path() / "young.tmp", old = cut.parent_path() / "old.tmp";
  spill(young, "half");
  spill(old, "half");
  fs::last_write_time(old, fs::file_time_type::clock::now() - std::chrono::hours(2));

  Store store({.directory = scratch.path()});
  const VerifyReport report = store.verify(false);
  CHECK(report.good == 1);
  REQUIRE(report.bad.size() == 3);
  CHECK(fs::exists(cut));
  CHECK(store.verify(true).bad.size() == 3);
  CHECK_FALSE(fs::exists(cut));
  CHECK_FALSE(fs::exists(old));
  CHECK(fs::exists(young)); // perhaps a write in progress
  CHECK(store.verify(true).bad.empty());
  CHECK(store.verify(true).good == 1);
}

TEST_CASE("clear removes every entry, also from memory, and nothing else", "[store]") {
  const Scratch scratch;
  Store store({.directory = scratch.path()});
  spill(store.directory() / "tuning.sqlite", "rows");
  for (const char* name : {"a", "b", "c"})
    (void)store.get_or_make(key_of(name), [] { return entry_of("image"); });
  CHECK(store.clear() == 3);
  CHECK(store.clear() == 0);
  CHECK(store.stats().entries == 0);
  CHECK_FALSE(store.get(key_of("a")));
  CHECK(slurp(store.directory() / "tuning.sqlite") == "rows");
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("image"); }));
  CHECK(store.stats().entries == 1);
}

TEST_CASE("a kernel costs one file; the rest of the cache is a lock file and a tag", "[store]") {
  const Scratch scratch;
  Store store({.directory = scratch.path()});
  constexpr int kEntries = 40;
  for (int i = 0; i < kEntries; ++i)
    (void)store.get_or_make(key_of(std::to_string(i)), [] { return entry_of("image"); });
  int files = 0;
  for (const auto& item : fs::recursive_directory_iterator(scratch.path()))
    files += item.is_regular_file() ? 1 : 0;
  CHECK(files == kEntries + 2);
  CHECK(slurp(scratch.path() / "CACHEDIR.TAG").rfind("Signature: 8a477f597d28d172789f06886806bc55", 0) == 0);
}

TEST_CASE("a cache directory removed under a running store is made again", "[store]") {
  const Scratch scratch;
  int warnings = 0;
  Store store({.directory = scratch.path() / "cache", .warn = [&](const std::string&) { ++warnings; }});
  (void)store.get_or_make(key_of("a"), [] { return entry_of("image"); });
  fs::remove_all(scratch.path() / "cache");
  CHECK(store.get_or_make(key_of("a"), never_made)); // memory
  CHECK(store.get_or_make(key_of("b"), [] { return entry_of("image"); }));
  CHECK(store.stats().entries == 1);
  CHECK(warnings == 0);
}

TEST_CASE("beyond the memory limit the entries used longest ago are read from disk again", "[layers]") {
  const Scratch scratch;
  const auto image = [](const std::string& name) { return entry_of(std::string(1000, name[0])); };
  Store store({.directory = scratch.path(), .max_memory_bytes = 3500});
  const auto source_of = [&](const std::string& name) {
    Source source = Source::made;
    CHECK(store.get(key_of(name), &source)->payload == image(name).payload);
    return source;
  };
  for (const char* name : {"a", "b", "c"})
    (void)store.get_or_make(key_of(name), [&] { return image(name); });
  CHECK(source_of("a") == Source::memory);  // now b was used longest ago
  const auto held = store.get(key_of("b")); // as a kernel would
  REQUIRE(source_of("a") == Source::memory);
  REQUIRE(source_of("c") == Source::memory);
  (void)store.get_or_make(key_of("d"), [&] { return image("d"); });
  CHECK(held->payload == image("b").payload);
  CHECK(source_of("a") == Source::memory);
  CHECK(source_of("b") == Source::disk); // and c goes
  CHECK(source_of("c") == Source::disk);
}

TEST_CASE("one entry above the memory limit is kept until there is another; without a disk it is made again",
          "[layers]") {
  Store store({.max_memory_bytes = 1});
  int made = 0;
  const auto make = [&](const char* name) {
    return store.get_or_make(key_of(name), [&] {
      ++made;
      return entry_of(name);
    });
  };
  CHECK(make("a") == make("a"));
  CHECK(made == 1);
  (void)make("b");
  CHECK(make("a")->payload == "a");
  CHECK(made == 3);
}

TEST_CASE("a memory limit of none keeps all", "[layers]") {
  Store store({});
  for (int i = 0; i < 100; ++i)
    (void)store.get_or_make(key_of(std::to_string(i)), [] { return entry_of(std::string(1000, 'x')); });
  for (int i = 0; i < 100; ++i)
    CHECK(store.get_or_make(key_of(std::to_string(i)), never_made));
}
