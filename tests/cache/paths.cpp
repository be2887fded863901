// Where the cache lives when nobody says so.
#include "scratch.h"
#include <catch2/catch.hpp>
#include <sys/stat.h>
#include <unistd.h>

using namespace kda::cache;
using namespace kda::cache::test;
namespace fs = std::filesystem;

/// Sets or unsets variables for one test.
class Environment {
public:
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;
  explicit Environment(const std::vector<std::pair<const char*, std::optional<fs::path>>>& values) {
    for (const auto& [name, value] : values) {
      const char* old = std::getenv(name);
      saved_.emplace_back(name, old ? std::optional<fs::path>(old) : std::nullopt);
      set(name, value);
    }
  }
  ~Environment() {
    for (auto& [name, value] : saved_)
      set(name, value);
  }

private:
  static void set(const char* name, const std::optional<fs::path>& value) {
    if (value)
      ::setenv(name, value->c_str(), 1);
    else
      ::unsetenv(name);
  }
  std::vector<std::pair<const char*, std::optional<fs::path>>> saved_;
};

static fs::path per_user(const fs::path& tmp) {
  return tmp / ("kda-jit-" + std::to_string(::geteuid()));
}

TEST_CASE("XDG_CACHE_HOME comes first, then HOME", "[paths]") {
  const Scratch scratch;
  const fs::path xdg = scratch.path() / "xdg", home = scratch.path() / "home";
  fs::create_directories(home);
  {
    const Environment environment({{"XDG_CACHE_HOME", xdg}, {"HOME", home}});
    CHECK(default_directory() == xdg / "kda-jit");
    CHECK(fs::is_directory(xdg / "kda-jit"));
    CHECK(fs::status(xdg / "kda-jit").permissions() == fs::perms::owner_all);
  }
  for (const auto& unset :
       {std::optional<fs::path>(), std::optional<fs::path>(""), std::optional<fs::path>("rel")}) {
    const Environment environment({{"XDG_CACHE_HOME", unset}, {"HOME", home}});
    CHECK(default_directory() == home / ".cache" / "kda-jit");
  }
}

TEST_CASE("without a usable home: a private directory of this user under the temporary one", "[paths]") {
  const Scratch scratch;
  const fs::path file = scratch.path() / "file", missing = scratch.path() / "missing";
  spill(file, "");
  // Unset, root of a container without a passwd entry, relative, not a directory, below a file, absent.
  for (const auto& home :
       {std::optional<fs::path>(), std::optional<fs::path>("/"), std::optional<fs::path>("rel"),
        std::optional<fs::path>(file), std::optional<fs::path>(file / "x"), std::optional<fs::path>(missing),
        std::optional<fs::path>("/proc")}) {
    const Environment environment(
        {{"XDG_CACHE_HOME", std::nullopt}, {"HOME", home}, {"TMPDIR", scratch.path()}});
    INFO(home.value_or("unset"));
    CHECK(default_directory() == per_user(scratch.path()));
    CHECK(fs::status(per_user(scratch.path())).permissions() == fs::perms::owner_all);
    CHECK_FALSE(fs::exists(missing));
  }
}

TEST_CASE("an XDG_CACHE_HOME that cannot be used gives way to HOME", "[paths]") {
  const Scratch scratch;
  spill(scratch.path() / "file", "");
  const Environment environment({{"XDG_CACHE_HOME", scratch.path() / "file"}, {"HOME", scratch.path()}});
  CHECK(default_directory() == scratch.path() / ".cache" / "kda-jit");
}

TEST_CASE("the shared temporary directory is not trusted", "[paths]") {
  const Scratch scratch;
  const Environment environment(
      {{"XDG_CACHE_HOME", std::nullopt}, {"HOME", std::nullopt}, {"TMPDIR", scratch.path()}});
  const fs::path trap = per_user(scratch.path());
  SECTION("a symbolic link") {
    fs::create_directories(scratch.path() / "elsewhere");
    fs::permissions(scratch.path() / "elsewhere", fs::perms::owner_all);
    fs::create_directory_symlink(scratch.path() / "elsewhere", trap);
  }
  SECTION("a directory that others can write in") {
    fs::create_directories(trap);
    fs::permissions(trap, fs::perms::all);
  }
  SECTION("a file") {
    spill(trap, "");
  }
  SECTION("a directory of another user") {
    fs::create_directories(trap);
    fs::permissions(trap, fs::perms::owner_all);
    if (::chown(trap.c_str(), 65534, 65534) != 0) {
      WARN("not checked: only root can give a directory away");
      return;
    }
  }
  CHECK(default_directory().empty());
  Store store({.directory = default_directory()});
  CHECK(store.get_or_make(key_of("a"), [] { return entry_of("image"); })->payload == "image");
}
