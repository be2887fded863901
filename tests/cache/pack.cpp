// Packs: one file of many entries, verified, read-only, the last layer of the cache.
#include "pack.h"
#include "scratch.h"
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>

using namespace kda::cache;
using namespace kda::cache::test;
namespace fs = std::filesystem;

namespace {

KeyManifest kernel_key(const std::string& arch, const std::string& source, const std::string& kind = "cuda") {
  KeyManifest key;
  key.add("kind", kind);
  key.add("arch", arch);
  key.add("compiler", "nvrtc 13.0");
  key.add("common.cuh", std::string(20000, 'c'));
  key.add("main.cu", source + "\nwith lines\n");
  return key;
}

std::string payload_of(int i) {
  return std::string(static_cast<std::size_t>(3000 + 100 * i), static_cast<char>('a' + i));
}

constexpr int kEntries = 6;

/// A pack of six kernels for sm_90a.
struct Packed {
  Scratch scratch;
  fs::path file = scratch.path() / "ünï kernels.kdapack";
  PackInfo info;
  std::string bytes;
  std::vector<std::string> warnings;

  Packed() {
    Store store({.directory = scratch.path() / "source"});
    for (int i = 0; i < kEntries; ++i)
      (void)store.get_or_make(kernel_key("sm_90a", std::to_string(i)), [&] {
        return Entry{payload_of(i), {{"log", "same log"}}};
      });
    info = store.pack(file, {}).value();
    bytes = slurp(file);
  }
  /// A store with nothing but the pack.
  [[nodiscard]] StoreOptions options() {
    return {.packs = {file}, .warn = [this](const std::string& text) { warnings.push_back(text); }};
  }
  /// Whether every key of a new store gives its own image or a miss; how many are found.
  int found() {
    Store store(options());
    int count = 0;
    for (int i = 0; i < kEntries; ++i)
      if (const auto entry = store.get(kernel_key("sm_90a", std::to_string(i)))) {
        CHECK(entry->payload == payload_of(i));
        CHECK(entry->metadata == std::vector<std::pair<std::string, std::string>>{{"log", "same log"}});
        ++count;
      }
    return count;
  }
};

} // namespace

TEST_CASE("a pack serves every entry, and what the keys have in common stands in it once", "[pack]") {
  Packed packed;
  CHECK(packed.info.entries == kEntries);
  CHECK(packed.info.bytes == packed.bytes.size());
  CHECK(packed.bytes.size() < 2 * 20000 + kEntries * 4000);
  CHECK(packed.found() == kEntries);
  CHECK(packed.warnings.empty());
  Store store(packed.options());
  Source source = Source::made;
  CHECK(store.get_or_make(kernel_key("sm_90a", "0"), never_made, &source));
  CHECK(source == Source::pack);
  CHECK(store.stats().pack_hits == 1);
  REQUIRE(store.packs().size() == 1);
  CHECK(store.packs()[0].digest == packed.info.digest);
  CHECK(store.packs()[0].labels == std::vector<std::pair<std::string, std::string>>{
                                       {"kind", "cuda"}, {"arch", "sm_90a"}, {"compiler", "nvrtc 13.0"}});
  CHECK(store.verify(true).good == kEntries);
}

TEST_CASE("a pack comes after the directories, and a hit is copied nowhere", "[pack]") {
  Packed packed;
  const fs::path user = packed.scratch.path() / "user";
  Store store({.directory = user, .packs = {packed.file}});
  CHECK(store.get_or_make(kernel_key("sm_90a", "1"), never_made)->payload == payload_of(1));
  CHECK(store.stats().entries == 0);
  (void)store.get_or_make(kernel_key("sm_90a", "new"), [] { return entry_of("new"); });
  CHECK(store.stats().entries == 1);
  CHECK(slurp(packed.file) == packed.bytes);

  Source source = Source::made;
  Store both({.directory = packed.scratch.path() / "source", .packs = {packed.file}});
  (void)both.get_or_make(kernel_key("sm_90a", "1"), never_made, &source);
  CHECK(source == Source::disk);
}

TEST_CASE("the same entries give the same pack, whatever they were read from", "[pack]") {
  Packed packed;
  const fs::path again = packed.scratch.path() / "again.kdapack";
  Store store({.packs = {packed.file}});
  CHECK(store.pack(again, {}).value().digest == packed.info.digest);
  CHECK(slurp(again) == packed.bytes);
}

TEST_CASE("a pack cut anywhere is not read, and says so once", "[pack]") {
  Packed packed;
  for (std::size_t length = 0; length < packed.bytes.size();
       length += length < 1200 || length + 20 > packed.bytes.size() ? 1 : 512) {
    INFO("cut at " << length);
    spill(packed.file, packed.bytes.substr(0, length));
    packed.warnings.clear();
    CHECK(packed.found() == 0);
    CHECK(packed.warnings.size() == 1);
  }
  spill(packed.file, packed.bytes + '\0');
  CHECK(packed.found() == 0);
}

TEST_CASE("a bit flipped anywhere in a pack never reaches a caller", "[pack]") {
  Packed packed;
  std::uint64_t index = 0; // its length, see the grammar
  std::memcpy(&index, packed.bytes.data() + 20, sizeof index);
  REQUIRE(index < 2000); // every byte of it; the blobs are large and all alike
  std::size_t lost = 0;
  for (std::size_t at = 0; at < packed.bytes.size(); at += at < index ? 1 : 97) {
    INFO("byte " << at);
    std::string bytes = packed.bytes;
    bytes[at] = static_cast<char>(bytes[at] ^ (1 << (at % 8)));
    spill(packed.file, bytes);
    packed.warnings.clear();
    CHECK(packed.found() < kEntries);
    CHECK(packed.warnings.size() == 1);
    CHECK_FALSE(Store(packed.options()).unpack(packed.file));
    ++lost;
  }
  CHECK(lost > 500);
  // What was damaged is made anew, and the rest is still served.
  std::string bytes = packed.bytes;
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  spill(packed.file, bytes);
  CHECK(packed.found() == kEntries - 1);
}

TEST_CASE("a pack that is overwritten while it is open is a miss", "[pack]") {
  Packed packed;
  Store store(packed.options());
  REQUIRE(store.get(kernel_key("sm_90a", "0")));
  SECTION("cut") {
    spill(packed.file, packed.bytes.substr(0, 100));
  }
  SECTION("emptied") {
    spill(packed.file, "");
  }
  SECTION("with something else") {
    spill(packed.file, std::string(packed.bytes.size(), 'x'));
  }
  for (int i = 1; i < kEntries; ++i)
    CHECK_FALSE(store.get(kernel_key("sm_90a", std::to_string(i))));
  CHECK(packed.warnings.size() == 1);
  CHECK(store.get_or_make(kernel_key("sm_90a", "1"), [] { return entry_of("again"); })->payload == "again");
}

TEST_CASE("a pack that is replaced or removed while it is open is served to the end", "[pack]") {
  Packed packed;
  Store store(packed.options());
  SECTION("replaced") {
    const fs::path other = packed.scratch.path() / "other";
    spill(other, "not a pack at all");
    fs::rename(other, packed.file);
  }
  SECTION("removed") {
    fs::remove(packed.file);
  }
  CHECK(store.get(kernel_key("sm_90a", "0"))->payload == payload_of(0));
  CHECK(packed.warnings.empty());
}

TEST_CASE("a pack of another format, and what is no pack, are not read", "[pack]") {
  Packed packed;
  std::string bytes = packed.bytes, word = "it is no pack";
  SECTION("version") {
    bytes[8] = 2;
    word = "format 2, this build reads 1";
  }
  SECTION("an entry") {
    bytes = slurp(file_of(packed.scratch.path() / "source", kernel_key("sm_90a", "0")));
  }
  SECTION("text") {
    bytes = "kernels";
  }
  spill(packed.file, bytes);
  CHECK(packed.found() == 0);
  REQUIRE(packed.warnings.size() == 1);
  CHECK_THAT(packed.warnings[0], Catch::Matchers::Contains(word) && Catch::Matchers::Contains("kdapack"));
}

TEST_CASE("a pack that is not there, or is a directory, is said once", "[pack]") {
  Packed packed;
  const bool absent = GENERATE(true, false);
  packed.file = absent ? packed.scratch.path() / "absent.kdapack" : packed.scratch.path();
  CHECK(packed.found() == 0);
  REQUIRE(packed.warnings.size() == 1);
  CHECK_THAT(packed.warnings[0], Catch::Matchers::Contains(packed.file.native()));
  CHECK(Store(packed.options()).verify(true).bad == std::vector<std::string>{packed.warnings[0]});
}

TEST_CASE("a pack for another architecture or compiler is a miss that says so once", "[pack]") {
  Packed packed;
  Store store(packed.options());
  CHECK_FALSE(store.get(kernel_key("x86-64", "0", "host"))); // not what the pack is about
  CHECK_FALSE(store.get(kernel_key("sm_90a", "another kernel")));
  CHECK(packed.warnings.empty());
  CHECK_FALSE(store.get(kernel_key("sm_100a", "0")));
  CHECK_FALSE(store.get(kernel_key("sm_100a", "1")));
  REQUIRE(packed.warnings.size() == 1);
  CHECK_THAT(packed.warnings[0], Catch::Matchers::Contains("made for arch 'sm_90a', here it is 'sm_100a'"));
}

TEST_CASE("packing takes what is asked for, leaves out what is damaged, and nothing gives no file",
          "[pack]") {
  const Scratch scratch;
  const fs::path file = scratch.path() / "p";
  std::vector<std::string> warnings;
  Store store(
      {.directory = scratch.path() / "c", .warn = [&](const std::string& t) { warnings.push_back(t); }});
  CHECK_FALSE(store.pack(file, {}));
  const auto arch = GENERATE("sm_90a", "sm_100a");
  for (const char* name : {"sm_90a", "sm_100a"})
    for (const char* source : {"0", "1"})
      (void)store.get_or_make(kernel_key(name, source), [&] { return entry_of(name); });
  CHECK_FALSE(store.pack(file, {{}, {"sm_80"}}));
  CHECK_FALSE(fs::exists(file));
  CHECK_FALSE(store.pack(scratch.path() / "no such directory" / "p", {}));
  CHECK(store.pack(file, {}).value().entries == 4);
  CHECK(store.pack(file, {{}, {arch}}).value().entries == 2);
  CHECK(Store({.packs = {file}}).get(kernel_key(arch, "1"))->payload == arch);
  CHECK(store.pack(file, {{kernel_key("sm_90a", "1").digest()}}).value().entries == 1);
  CHECK(warnings.empty());

  spill(file_of(scratch.path() / "c", kernel_key("sm_90a", "0")), "damaged");
  Store next(
      {.directory = scratch.path() / "c", .warn = [&](const std::string& t) { warnings.push_back(t); }});
  CHECK(next.pack(file, {}).value().entries == 3);
  CHECK(warnings.size() == 1);
}

TEST_CASE("unpacking adds what the directory does not have, and mends what is damaged", "[pack]") {
  Packed packed;
  const fs::path user = packed.scratch.path() / "user";
  Store store({.directory = user});
  (void)store.get_or_make(kernel_key("sm_90a", "0"), [] { return Entry{payload_of(0), {{"log", "own"}}}; });
  (void)store.get_or_make(kernel_key("sm_90a", "1"), [] { return entry_of("damaged soon"); });
  spill(file_of(user, kernel_key("sm_90a", "1")), "damaged");
  const auto report = store.unpack(packed.file);
  REQUIRE(report);
  CHECK(report->added == kEntries - 1);
  CHECK(report->present == 1);
  Store next({.directory = user});
  CHECK(next.get(kernel_key("sm_90a", "0"))->metadata[0].second == "own");
  for (int i = 1; i < kEntries; ++i)
    CHECK(next.get(kernel_key("sm_90a", std::to_string(i)))->payload == payload_of(i));
  CHECK_FALSE(Store(StoreOptions{}).unpack(packed.file)); // memory only
}

TEST_CASE("a discarded entry of a pack is not read again", "[pack]") {
  Packed packed;
  Store store(packed.options());
  const KeyManifest key = kernel_key("sm_90a", "0");
  REQUIRE(store.get(key));
  store.discard(key, "error 209");
  CHECK_FALSE(store.get(key));
}

TEST_CASE("the fields of a key are read back, whatever they hold", "[pack]") {
  KeyManifest key;
  key.add("a b", "x\n\ny 3\n");
  key.add("empty", "");
  const auto fields = key_fields(key.text());
  REQUIRE(fields);
  REQUIRE(fields->size() == 2);
  CHECK(fields->at(0).name == "a b");
  CHECK(fields->at(0).value == "x\n\ny 3\n");
  CHECK(fields->at(1).value.empty());
  for (const char* text : {"a", "a 1\n", "a 1\nx", "a 1\nxy", "a x\ny\n", "a -1\n\n",
                           "a 99999999999999999999\nx\n", "a 18446744073709551615\nx\n"})
    CHECK_FALSE(key_fields(text));
  CHECK(key_fields("")->empty());
}
