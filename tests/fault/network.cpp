// A file system between machines: a handle goes stale, a rename is lost or said to be lost, and what another
// machine has written stays invisible for a while. Each costs a compile at most.
#include "process.h"
#include "scratch.h"
#include "shim.h"
#include <catch2/catch.hpp>
#include <cerrno>
#include <utility>

using namespace kda::cache;
using namespace kda::cache::test;
namespace fs = std::filesystem;

static std::shared_ptr<const Entry> make(Store& store, const std::string& payload, Source& source) {
  return store.get_or_make(
      key_of("a"), [&] { return entry_of(payload); }, &source);
}

TEST_CASE("a stale handle when opening is a miss, and the entry is made", "[fault]") {
  const Scratch scratch;
  Source source = Source::memory;
  {
    Store store({.directory = scratch.path()});
    (void)make(store, "old", source);
  }
  int warnings = 0;
  Store store({.directory = scratch.path(), .warn = [&](const std::string&) { ++warnings; }});
  {
    const Failing failing(Call::open_entry, GENERATE(ESTALE, EIO, EACCES));
    CHECK(make(store, "new", source)->payload == "new");
    CHECK(source == Source::made);
    CHECK(failing.count() > 0);
  }
  CHECK(warnings == 1);
  CHECK(Store({.directory = scratch.path()}).get(key_of("a"))->payload == "new");
}

TEST_CASE("a winner that stays invisible costs the loser a make, not an error", "[fault]") {
  const Scratch scratch;
  Source source = Source::memory;
  Store winner({.directory = scratch.path()});
  (void)make(winner, "winner's", source);
  int warnings = 0;
  Store loser({.directory = scratch.path(), .warn = [&](const std::string&) { ++warnings; }});
  {
    const Failing invisible(Call::open_entry, ENOENT); // the client remembers that there was none
    CHECK(make(loser, "loser's", source)->payload == "loser's");
    CHECK(source == Source::made);
    CHECK(invisible.count() == 2); // before the lock and under it
  }
  CHECK(warnings == 0);
  CHECK(fs::exists(file_of(scratch.path(), key_of("a"))));
  CHECK(Store({.directory = scratch.path()}).verify(false).good == 1);
}

TEST_CASE("a loser whose rename fails while the winner is invisible still runs", "[fault]") {
  const Scratch scratch;
  Source source = Source::memory;
  Store winner({.directory = scratch.path()});
  (void)make(winner, "winner's", source);
  int warnings = 0;
  Store loser({.directory = scratch.path(), .warn = [&](const std::string&) { ++warnings; }});
  {
    const Failing failing({{Call::open_entry, ENOENT}, {Call::rename, ESTALE}});
    CHECK(make(loser, "loser's", source)->payload == "loser's");
    CHECK(make(loser, "again", source)->payload == "loser's"); // from memory: no file is read back
  }
  CHECK(warnings == 1);
  CHECK(Store({.directory = scratch.path()}).get(key_of("a"))->payload == "winner's");
}

TEST_CASE("a rename that was done and is reported as failed leaves a good entry", "[fault]") {
  // The client repeats a request whose answer was lost, and the server finds the source gone.
  const Scratch scratch;
  Source source = Source::memory;
  Store store({.directory = scratch.path()});
  {
    const Failing failing(Call::rename_done, ENOENT);
    CHECK(make(store, "image", source)->payload == "image");
    CHECK(failing.count() == 1);
  }
  CHECK(Store({.directory = scratch.path()}).get(key_of("a"))->payload == "image");
  CHECK(Store({.directory = scratch.path()}).verify(false).good == 1);
}

TEST_CASE("a pack whose handle goes stale while it is open is a miss, and so is one that cannot be read",
          "[fault]") {
  const Scratch scratch;
  const fs::path file = scratch.path() / "kernels.kdapack";
  Source source = Source::memory;
  {
    Store store({.directory = scratch.path() / "source"});
    (void)make(store, "packed", source);
    REQUIRE(store.pack(file, {}));
  }
  int warnings = 0;
  const StoreOptions options{.packs = {file}, .warn = [&](const std::string&) { ++warnings; }};
  const int error = GENERATE(ESTALE, EIO);
  Store open(options);
  {
    const Failing failing(Call::read_pack, error);
    CHECK(make(open, "made", source)->payload == "made");
    CHECK(source == Source::made);
    CHECK(failing.count() == 1);
    CHECK(warnings == 1);
    Store never_opened(options);
    CHECK(make(never_opened, "made", source)->payload == "made");
    CHECK(warnings == 2);
  }
  Store well(options);
  CHECK(make(well, "made", source)->payload == "packed");
  CHECK(source == Source::pack);
}

// What is in use stays: eviction on a file system that others use at the same time and that has its own
// clock.
namespace {

void fill(const Scratch& scratch, int count, std::chrono::minutes last_used) {
  Store store({.directory = scratch.path()});
  for (int i = 0; i < count; ++i) {
    const auto key = key_of(std::to_string(i));
    (void)store.get_or_make(key, [] { return entry_of(std::string(10000, 'x')); });
    fs::last_write_time(file_of(scratch.path(), key),
                        fs::file_time_type::clock::now() - last_used + std::chrono::seconds(i));
  }
}
bool there(const Scratch& scratch, int number) {
  return fs::exists(file_of(scratch.path(), key_of(std::to_string(number))));
}

} // namespace

TEST_CASE("an entry that is used or replaced while others are evicted stays", "[fault]") {
  const Scratch scratch;
  fill(scratch, 4, std::chrono::minutes(60));
  Store store({.directory = scratch.path()});
  bool first = true;
  const OnRemove meanwhile([&](const std::string&) {
    if (!std::exchange(first, false)) return;
    (void)Store({.directory = scratch.path()}).get(key_of("2")); // another process
    fs::last_write_time(file_of(scratch.path(), key_of("3")), fs::file_time_type::clock::now());
  });
  CHECK(store.prune(1).removed == 2);
  CHECK_FALSE(first);
  for (int i = 0; i < 4; ++i)
    CHECK(there(scratch, i) == (i >= 2));
}

TEST_CASE("what is in use is told by the clock of the file system, not by this machine's", "[fault]") {
  const Scratch scratch;
  const auto ahead = std::chrono::minutes(GENERATE(-20, 20));
  const FileClock clock(ahead);
  Store store({.directory = scratch.path()});
  fill(scratch, 1, std::chrono::minutes(4) - ahead); // four minutes ago there
  CHECK(store.prune(1).removed == 0);
  fill(scratch, 1, std::chrono::minutes(8) - ahead);
  CHECK(store.prune(1).removed == 1);
}

TEST_CASE("a hit is noted whichever way the clock of the file system is off", "[fault]") {
  const Scratch scratch;
  const auto ahead = std::chrono::minutes(GENERATE(-20, 0, 20));
  const FileClock clock(ahead);
  fill(scratch, 1, std::chrono::minutes(8) - ahead);
  REQUIRE(Store({.directory = scratch.path()}).get(key_of("0")));
  CHECK(Store({.directory = scratch.path()}).prune(1).removed == 0);
}
