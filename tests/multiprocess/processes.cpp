// Several processes, one cache: one make per key, no mixed entries, and nobody waits for the dead.
#include "cache/tuning_db.h"
#include "process.h"
#include "scratch.h"
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <spawn.h>
#include <sys/stat.h>
#include <thread>

using namespace kda::cache;
using namespace kda::cache::test;
using namespace std::chrono_literals;
namespace fs = std::filesystem;

static double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// A store without patience: one that would have to wait for a lock says so instead.
static Store impatient(const fs::path& directory, int& warnings) {
  return Store(
      {.directory = directory, .warn = [&](const std::string&) { ++warnings; }, .lock_wait_seconds = 0});
}

/// A program that outlives its parent; its first act, once it has closed what it was not to have, is to open
/// the gate.
static void leave_child(int gate) {
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, gate, STDOUT_FILENO);
  std::string shell = "sh", option = "-c", text = "echo; exec sleep 5";
  char* const arguments[] = {shell.data(), option.data(), text.data(), nullptr};
  pid_t pid = 0;
  (void)::posix_spawn(&pid, "/bin/sh", &actions, nullptr, arguments, environ);
  ::posix_spawn_file_actions_destroy(&actions);
}

/// A process that holds the lock of `key` for ever; returns once it does.
static Process hold(const fs::path& directory, const KeyManifest& key, bool with_child = false) {
  Gate inside;
  Process holder([&] {
    Store store({.directory = directory});
    (void)store.get_or_make(key, [&]() -> std::optional<Entry> {
      if (with_child)
        leave_child(inside.entrance());
      else
        inside.open();
      for (;;)
        ::pause();
    });
    return 0;
  });
  inside.wait();
  return holder;
}

TEST_CASE("sixteen cold processes make one key once, fifty times, behind a symbolic link", "[multiprocess]") {
  constexpr int kProcesses = 16, kRounds = 50;
  const Scratch scratch;
  fs::create_directory(scratch.path() / "real");
  fs::create_directory_symlink(scratch.path() / "real", scratch.path() / "cache");
  struct Shared {
    Barrier barrier{kProcesses};
    std::atomic<int> made[kRounds] = {}, wrong = 0;
  };
  const SharedMemory<Shared> shared;
  std::vector<Process> processes;
  for (int p = 0; p < kProcesses; ++p)
    processes.emplace_back([&] {
      for (int round = 0; round < kRounds; ++round) {
        const std::string image = "image " + std::to_string(round);
        shared->barrier.wait();
        Store store({.directory = scratch.path() / "cache"}); // cold: nothing in memory
        Source source = Source::memory;
        const auto entry = store.get_or_make(
            key_of(image),
            [&] {
              ++shared->made[round];
              std::this_thread::sleep_for(5ms);
              return entry_of(image);
            },
            &source);
        const bool right = entry && entry->payload == image;
        shared->wrong += right && (source == Source::made || source == Source::disk) ? 0 : 1;
      }
      return 0;
    });
  for (Process& process : processes)
    CHECK(process.wait() == 0);
  CHECK(shared->wrong == 0);
  for (int round = 0; round < kRounds; ++round)
    CHECK(shared->made[round] == 1);
  CHECK(Store({.directory = scratch.path() / "real"}).verify(false).good == kRounds);
}

TEST_CASE("processes make different keys at the same time", "[multiprocess]") {
  const Scratch scratch;
  Process holder = hold(scratch.path(), key_of("a"));
  int warnings = 0;
  Store store = impatient(scratch.path(), warnings);
  CHECK(store.get_or_make(key_of("b"), [] { return entry_of("image"); }));
  CHECK(warnings == 0);
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("image"); }));
  CHECK(warnings == 1); // that one was held
}

TEST_CASE("a killed holder delays nobody, even with a child left behind", "[multiprocess]") {
  const Scratch scratch;
  const bool with_child = GENERATE(false, true);
  Process holder = hold(scratch.path(), key_of("a"), with_child);
  holder.kill();
  int warnings = 0;
  Store store = impatient(scratch.path(), warnings);
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("image"); })->payload == "image");
  CHECK(warnings == 0);
  CHECK(store.stats().entries == 1);
}

TEST_CASE("a waiter goes on alone when the wait limit has passed", "[multiprocess]") {
  const Scratch scratch;
  Process holder = hold(scratch.path(), key_of("a"));
  std::vector<std::string> warnings;
  Store store({.directory = scratch.path(),
               .warn = [&](const std::string& text) { warnings.push_back(text); },
               .lock_wait_seconds = 0.2});
  const auto start = std::chrono::steady_clock::now();
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("image"); })->payload == "image");
  CHECK(seconds_since(start) >= 0.2);
  REQUIRE(warnings.size() == 1);
  CHECK(warnings[0].find("waited 0.2 s") != std::string::npos);
}

TEST_CASE("an old, empty lock file is no lock, and it is never replaced", "[multiprocess]") {
  const Scratch scratch;
  fs::create_directories(scratch.path() / "v1");
  spill(scratch.path() / "v1" / "lock", "");
  struct stat before = {}, after = {};
  REQUIRE(::stat((scratch.path() / "v1" / "lock").c_str(), &before) == 0);
  Store store({.directory = scratch.path()});
  for (int i = 0; i < 1000; ++i) // a failing make: the lock alone
    CHECK_FALSE(store.get_or_make(key_of("a"), [] { return std::optional<Entry>(); }));
  REQUIRE(::stat((scratch.path() / "v1" / "lock").c_str(), &after) == 0);
  CHECK(before.st_ino == after.st_ino);
}

TEST_CASE("two writers of one key: a reader sees one or the other, whole", "[multiprocess]") {
  const Scratch scratch;
  const fs::path cache = scratch.path() / "cache";
  const auto writer = [&](char letter) {
    return Process([&cache, letter] {
      Store store({.directory = cache, .lock_wait_seconds = 0});
      for (int i = 0; i < 60; ++i) {
        store.discard(key_of("a"), "to write it again");
        (void)store.get_or_make(key_of("a"), [&] {
          return Entry{std::string(40000, letter), {{"letter", std::string(1, letter)}}};
        });
      }
      return 0;
    });
  };
  std::vector<Process> writers;
  writers.push_back(writer('x'));
  writers.push_back(writer('y'));
  int seen = 0, mixed = 0, warnings = 0;
  const auto read = [&] {
    Store store({.directory = cache, .warn = [&](const std::string&) { ++warnings; }});
    const auto entry = store.get(key_of("a"));
    if (!entry) return;
    ++seen;
    const char letter = entry->metadata.at(0).second.at(0);
    mixed += entry->payload == std::string(40000, letter) ? 0 : 1;
  };
  for (int i = 0; i < 200; ++i) {
    read();
    std::this_thread::sleep_for(1ms);
  }
  for (Process& process : writers)
    CHECK(process.wait() == 0);
  read();
  CHECK(seen > 0);
  CHECK(mixed == 0);
  CHECK(warnings == 0);
}

TEST_CASE("processes that open a fresh tuning database at once all keep their rows", "[multiprocess]") {
  const Scratch scratch;
  Gate start;
  std::vector<Process> processes;
  for (int p = 0; p < 4; ++p)
    processes.emplace_back([&, p] {
      start.wait();
      int warnings = 0;
      TuningDb db(scratch.path(), [&](const std::string&) { ++warnings; });
      for (int i = 0; i < 10; ++i) {
        TuningRow row;
        row.problem = "forward";
        row.variant = std::to_string(p) + "/" + std::to_string(i);
        row.status = "ok";
        if (!db.put({row})) return 2;
      }
      return warnings;
    });
  start.open();
  for (Process& process : processes)
    CHECK(process.wait() == 0);
  CHECK(TuningDb(scratch.path(), nullptr).rows().size() == 40);
}
