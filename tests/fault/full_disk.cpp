// A file system of 1 MB that runs full: everything is made and used, nothing half is left, and when there is
// room again entries appear again.
#include "cache/tuning_db.h"
#include "process.h"
#include "scratch.h"
#include <catch2/catch.hpp>
#include <sched.h>
#include <sys/mount.h>

using namespace kda::cache;
using namespace kda::cache::test;
namespace fs = std::filesystem;

namespace {

constexpr int kCannotMount = 77;

/// Runs `body` in a process that sees a tmpfs of 1 MB at `directory`; it vanishes with the process.
template <class Body>
int on_small_disk(const fs::path& directory, const Body& body) {
  return Process([&] {
           if (::unshare(CLONE_NEWNS) != 0 && ::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0)
             return kCannotMount;
           if (::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
               ::mount("kda-jit", directory.c_str(), "tmpfs", 0, "size=1m") != 0)
             return kCannotMount;
           return body();
         })
      .wait();
}

Entry large(char letter) {
  return entry_of(std::string(200000, letter));
}
std::string name_of(char letter) {
  return {letter};
}

} // namespace

TEST_CASE("a full file system of 1 MB", "[fault]") {
  const Scratch scratch;
  const int code = on_small_disk(scratch.path(), [&] {
    int warnings = 0;
    {
      Store store({.directory = scratch.path(), .warn = [&](const std::string&) { ++warnings; }});
      for (char letter = 'a'; letter < 'k'; ++letter) // twice what fits
        if (store.get_or_make(key_of(name_of(letter)), [&] { return large(letter); })->payload !=
            large(letter).payload)
          return 1;
      for (char letter = 'a'; letter < 'k'; ++letter)
        if (!store.get_or_make(key_of(name_of(letter)), never_made)) return 2;
      if (warnings != 1) return 3; // one cause
    }
    Store store({.directory = scratch.path()});
    const VerifyReport report = store.verify(false);
    if (!report.bad.empty() || report.good < 3 || report.good > 5) return 4;
    for (const auto& file : fs::recursive_directory_iterator(scratch.path()))
      if (file.path().extension() == ".tmp") return 5;
    if (store.get(key_of(name_of('j')))) return 6;
    fs::remove(file_of(scratch.path(), key_of(name_of('a')))); // room
    if (!store.get_or_make(key_of(name_of('j')), [&] { return large('j'); })) return 7;
    return Store({.directory = scratch.path()}).get(key_of(name_of('j'))) ? 0 : 8;
  });
  if (code == kCannotMount) {
    WARN("SKIPPED: this user may not mount a tmpfs; the tests with a file-size limit and ENOSPC stand in");
    return;
  }
  CHECK(code == 0);
}

TEST_CASE("a tuning database on a full file system", "[fault]") {
  const Scratch scratch;
  const int code = on_small_disk(scratch.path(), [&] {
    const auto rows_of = [](int first, int count) {
      std::vector<TuningRow> rows(static_cast<std::size_t>(count));
      for (std::size_t i = 0; i < rows.size(); ++i) {
        rows[i].variant = std::to_string(first + static_cast<int>(i));
        rows[i].reason = std::string(500, 'r');
      }
      return rows;
    };
    { // Closed, so that the rows are in the file itself and not in its log.
      TuningDb db(scratch.path(), nullptr);
      if (!db.put(rows_of(0, 10))) return 1;
    }
    int warnings = 0;
    {
      TuningDb db(scratch.path(), [&](const std::string&) { ++warnings; });
      if (!db.put(rows_of(10, 5000))) return 2;
      if (warnings != 1 || db.rows().size() != 5010) return 3;
    }
    return TuningDb(scratch.path(), nullptr).rows().size() == 10 ? 0 : 4;
  });
  if (code == kCannotMount) {
    WARN("SKIPPED: this user may not mount a tmpfs; the test with a file-size limit stands in");
    return;
  }
  CHECK(code == 0);
}
