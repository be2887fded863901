// A damaged file is never loaded, whatever was damaged: the entry is made again and the next store finds it.
#include "scratch.h"
#include <catch2/catch.hpp>

using namespace kda::cache;
using namespace kda::cache::test;
namespace fs = std::filesystem;

namespace {

constexpr std::size_t kPayload = 48 * 1024;
const Entry kGood{std::string(kPayload, 'p'), {{"registers", "168"}, {"log", "ptxas"}}};
const Entry kAgain{std::string(kPayload, 'q'), {}};

struct Seeded {
  Scratch scratch;
  KeyManifest key = key_of("a");
  fs::path file = file_of(scratch.path(), key);
  std::string good;

  Seeded() {
    (void)Store({.directory = scratch.path()}).get_or_make(key, [] { return kGood; });
    good = slurp(file);
  }
  /// Whether `bytes` in the place of the file are made again, and found by the next store.
  [[nodiscard]] bool heals(const std::string& bytes) const {
    spill(file, bytes);
    Store store({.directory = scratch.path()});
    Source source = Source::disk;
    const auto entry = store.get_or_make(
        key, [] { return kAgain; }, &source);
    const auto next = Store({.directory = scratch.path()}).get(key);
    return source == Source::made && entry->payload == kAgain.payload && next &&
           next->payload == kAgain.payload;
  }
};

} // namespace

TEST_CASE("a file cut at any KiB is made again", "[damage]") {
  const Seeded seeded;
  REQUIRE(seeded.good.size() > kPayload);
  for (std::size_t length = 0; length < seeded.good.size(); length += 1024) {
    INFO("cut at " << length);
    CHECK(seeded.heals(seeded.good.substr(0, length)));
  }
}

TEST_CASE("a bit flipped in any region is made again", "[damage]") {
  const Seeded seeded;
  const std::size_t size = seeded.good.size(), manifest = seeded.key.text().size();
  const std::pair<const char*, std::size_t> regions[] = {{"magic", 0},
                                                         {"version", 8},
                                                         {"size", 12},
                                                         {"length of the manifest", 20},
                                                         {"manifest", 28},
                                                         {"number of metadata", 28 + manifest},
                                                         {"length of a name", 32 + manifest},
                                                         {"name", 40 + manifest},
                                                         {"length of the payload", size - 16 - kPayload - 8},
                                                         {"first byte of the payload", size - 16 - kPayload},
                                                         {"middle of the payload", size - kPayload / 2},
                                                         {"last byte of the payload", size - 17},
                                                         {"checksum", size - 16},
                                                         {"last byte", size - 1}};
  for (const auto& [region, at] : regions)
    for (const int bit : {0, 7}) {
      INFO(region << ", bit " << bit);
      std::string bytes = seeded.good;
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << bit));
      CHECK(seeded.heals(bytes));
    }
}

TEST_CASE("zeros where a crash lost the pages of a file are made again", "[damage]") {
  const Seeded seeded;
  for (std::size_t page = 0; page < seeded.good.size(); page += 4096) {
    std::string bytes = seeded.good;
    const std::size_t count = std::min<std::size_t>(4096, bytes.size() - page);
    bytes.replace(page, count, count, '\0');
    CHECK(seeded.heals(bytes));
  }
}
