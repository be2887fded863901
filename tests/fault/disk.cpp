// A disk that fails: the kernel is made and used, the user is told once, and no bad file stays.
#include "cache/tuning_db.h"
#include "process.h"
#include "scratch.h"
#include "shim.h"
#include <catch2/catch.hpp>
#include <cerrno>
#include <sys/resource.h>
#include <unistd.h>

using namespace kda::cache;
using namespace kda::cache::test;
namespace fs = std::filesystem;

static int files_in(const fs::path& directory) {
  int files = 0;
  for (const auto& item : fs::recursive_directory_iterator(directory))
    files += item.is_regular_file() && item.path().filename() != "lock" &&
             item.path().filename() != "CACHEDIR.TAG";
  return files;
}

struct Warnings {
  std::vector<std::string> texts;
  std::function<void(const std::string&)> sink = [this](const std::string& text) { texts.push_back(text); };
};

TEST_CASE("an entry that cannot be published is used, and nothing is left on disk", "[fault]") {
  const auto [call, error] = GENERATE(table<Call, int>({{Call::rename, EXDEV},
                                                        {Call::rename, ESTALE},
                                                        {Call::write, ENOSPC},
                                                        {Call::write, EIO},
                                                        {Call::fsync, ENOSPC},
                                                        {Call::fsync, EIO}}));
  const Scratch scratch;
  Warnings warnings;
  Store store({.directory = scratch.path(), .warn = warnings.sink});
  {
    const Failing failing(call, error);
    Source source = Source::memory;
    for (const char* name : {"a", "b"}) {
      CHECK(store
                .get_or_make(
                    key_of(name), [&] { return entry_of(name); }, &source)
                ->payload == name);
      CHECK(source == Source::made);
      CHECK(store.get_or_make(key_of(name), never_made, &source)->payload == name);
      CHECK(source == Source::memory);
    }
    CHECK(failing.count() == 2);
  }
  CHECK(warnings.texts.size() == 1); // one cause
  CHECK(files_in(scratch.path()) == 0);
  // When the disk works again, so does the cache.
  CHECK(store.get_or_make(key_of("c"), [] { return entry_of("c"); }));
  CHECK(files_in(scratch.path()) == 1);
}

TEST_CASE("two causes are two warnings", "[fault]") {
  const Scratch scratch;
  Warnings warnings;
  Store store({.directory = scratch.path(), .warn = warnings.sink});
  for (const int error : {ENOSPC, ESTALE, ENOSPC, ESTALE}) {
    const Failing failing(Call::rename, error);
    (void)store.get_or_make(key_of("a"), [] { return entry_of("a"); });
    store.clear();
  }
  CHECK(warnings.texts.size() == 2);
}

TEST_CASE("a file that can be seen but not read is a miss", "[fault]") {
  const Scratch scratch;
  (void)Store({.directory = scratch.path()}).get_or_make(key_of("a"), [] { return entry_of("old"); });
  Warnings warnings;
  Store store({.directory = scratch.path(), .warn = warnings.sink});
  const int error = GENERATE(ESTALE, EIO);
  const Failing failing(Call::read, error);
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("new"); })->payload == "new");
  CHECK(failing.count() > 0);
  REQUIRE(warnings.texts.size() == 1);
  CHECK(warnings.texts[0].find(std::generic_category().message(error)) != std::string::npos);
}

TEST_CASE("without locks every process makes its own", "[fault]") {
  const Scratch scratch;
  Warnings warnings;
  Store store({.directory = scratch.path(), .warn = warnings.sink});
  const Failing failing(Call::lock, ENOLCK);
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("a"); }));
  CHECK(store.get_or_make(key_of("b"), [] { return entry_of("b"); }));
  CHECK(failing.count() == 3); // two makes, and one look at the size limit
  CHECK(warnings.texts.size() == 1);
  CHECK(files_in(scratch.path()) == 2);
}

TEST_CASE("a rename that a directory blocks", "[fault]") {
  const Scratch scratch;
  fs::create_directories(file_of(scratch.path(), key_of("a")) / "not empty");
  Store store({.directory = scratch.path()});
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("image"); })->payload == "image");
  CHECK(files_in(scratch.path()) == 0);
}

TEST_CASE("a cache directory that cannot be made", "[fault]") {
  const Scratch scratch;
  spill(scratch.path() / "file", "");
  Warnings warnings;
  Store store({.directory = scratch.path() / "file" / "cache", .warn = warnings.sink});
  for (const char* name : {"a", "b"})
    CHECK(store.get_or_make(key_of(name), [&] { return entry_of(name); })->payload == name);
  CHECK(store.get_or_make(key_of("a"), never_made));
  CHECK(warnings.texts.size() == 1);
  CHECK(store.stats().entries == 0);
  CHECK(store.verify(true).bad.empty());
  CHECK(store.clear() == 0);
}

/// Runs `body` as a user who is not root, who owns `directory`.
template <class Body>
static int as_user(const fs::path& directory, Body&& body) {
  constexpr uid_t kNobody = 65534;
  return Process([&] {
           if (::geteuid() == 0 && (::lchown(directory.c_str(), kNobody, kNobody) != 0 ||
                                    ::setgid(kNobody) != 0 || ::setuid(kNobody) != 0))
             return 98;
           return body();
         })
      .wait();
}

TEST_CASE("a directory without permission to write serves hits and makes the rest in memory", "[fault]") {
  const Scratch scratch;
  CHECK(as_user(scratch.path(), [&] {
          const fs::path cache = scratch.path() / "cache";
          (void)Store({.directory = cache}).get_or_make(key_of("old"), [] { return entry_of("old"); });
          for (const auto& item : fs::recursive_directory_iterator(cache))
            fs::permissions(item, item.is_directory() ? fs::perms(0555) : fs::perms(0444));
          fs::permissions(cache, fs::perms(0555));
          Warnings warnings;
          Store store({.directory = cache, .warn = warnings.sink});
          Source source = Source::made;
          if (!store.get_or_make(key_of("old"), never_made, &source) || source != Source::disk) return 1;
          for (const char* name : {"a", "b"})
            if (!store.get_or_make(key_of(name), [&] { return entry_of(name); })) return 2;
          if (warnings.texts.size() != 1 || store.stats().entries != 1) return 3;
          for (const auto& item : fs::recursive_directory_iterator(cache))
            if (item.is_directory()) fs::permissions(item, fs::perms(0755));
          fs::permissions(cache, fs::perms(0755));
          return 0;
        }) == 0);
}

TEST_CASE("a read-only home gives way to the temporary directory", "[fault]") {
  const Scratch scratch;
  CHECK(as_user(scratch.path(), [&] {
          const fs::path home = scratch.path() / "home", tmp = scratch.path() / "tmp";
          fs::create_directories(home);
          fs::create_directories(tmp);
          fs::permissions(home, fs::perms(0555));
          ::unsetenv("XDG_CACHE_HOME");
          ::setenv("HOME", home.c_str(), 1);
          ::setenv("TMPDIR", tmp.c_str(), 1);
          if (default_directory() != tmp / ("kda-jit-" + std::to_string(::geteuid()))) return 1;
          fs::remove_all(tmp / ("kda-jit-" + std::to_string(::geteuid())));
          fs::permissions(tmp, fs::perms(0555));
          return default_directory().empty() ? 0 : 2;
        }) == 0);
}

TEST_CASE("a file-size limit: too large an entry stays in memory, the next one is kept", "[fault]") {
  const Scratch scratch;
  Process limited([&] {
    const rlimit limit = {4096, 4096};
    ::signal(SIGXFSZ, SIG_IGN);
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
    Warnings warnings;
    Store store({.directory = scratch.path(), .warn = warnings.sink});
    if (!store.get_or_make(key_of("large"), [] { return entry_of(std::string(10000, 'x')); })) return 2;
    if (files_in(scratch.path()) != 0 || warnings.texts.size() != 1) return 3;
    if (!store.get_or_make(key_of("small"), [] { return entry_of("x"); })) return 4;
    return files_in(scratch.path()) == 1 ? 0 : 5;
  });
  CHECK(limited.wait() == 0);
}

static std::vector<TuningRow> many_rows(int count) {
  std::vector<TuningRow> rows(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i].variant = std::to_string(i);
    rows[i].reason = std::string(200, 'r');
  }
  return rows;
}

TEST_CASE("a tuning database whose disk is full goes on in memory with the rows it had", "[fault]") {
  const Scratch scratch;
  Process limited([&] {
    const rlimit limit = {65536, 65536};
    ::signal(SIGXFSZ, SIG_IGN);
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
    Warnings warnings;
    { // Closed, so that the rows are in the file itself and not in its log.
      TuningDb first(scratch.path(), warnings.sink);
      if (!first.put(many_rows(3))) return 2;
    }
    TuningDb db(scratch.path(), warnings.sink);
    if (!warnings.texts.empty()) return 3;
    if (!db.put(many_rows(1000))) return 4;
    return warnings.texts.size() == 1 && db.rows().size() == 1000 ? 0 : 5;
  });
  CHECK(limited.wait() == 0);
  CHECK(TuningDb(scratch.path(), nullptr).rows().size() == 3);
}

TEST_CASE("a tuning database that may only be read serves its rows and takes new ones in memory", "[fault]") {
  const Scratch scratch;
  CHECK(as_user(scratch.path(), [&] {
          {
            TuningDb db(scratch.path(), nullptr);
            if (!db.put(many_rows(3))) return 1;
          }
          fs::permissions(scratch.path() / "tuning.sqlite", fs::perms(0444));
          fs::permissions(scratch.path(), fs::perms(0555));
          Warnings warnings;
          TuningDb db(scratch.path(), warnings.sink);
          if (db.rows().size() != 3) return 2;
          if (!db.put(many_rows(5)) || db.rows().size() != 5) return 3;
          return warnings.texts.size() == 1 ? 0 : 4;
        }) == 0);
}
