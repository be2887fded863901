#include "cache/store.h"
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

namespace kda::cache {
namespace fs = std::filesystem;
namespace {

constexpr mode_t kPrivate = 0700;

/// An absolute path from the environment; anything else counts as unset.
fs::path path_variable(const char* name) {
  const char* value = std::getenv(name);
  const fs::path path = value ? value : "";
  return path.is_absolute() ? path : fs::path();
}

/// Makes `path` if it is not there. True when this user owns it and can write in it: entries are code that
/// will run, so a directory of somebody else is never used unasked.
bool own_directory(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path.parent_path(), error);
  (void)::mkdir(path.c_str(), kPrivate);
  struct stat status = {};
  return ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode) && status.st_uid == ::geteuid() &&
         ::access(path.c_str(), W_OK | X_OK) == 0;
}

/// The same under a directory that everybody can write in: its name can be guessed, so a symbolic link or a
/// directory that others may write in is a trap.
bool private_directory(const fs::path& path) {
  (void)::mkdir(path.c_str(), kPrivate);
  struct stat status = {};
  return ::lstat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode) && status.st_uid == ::geteuid() &&
         (status.st_mode & 077) == 0 && ::access(path.c_str(), W_OK | X_OK) == 0;
}

} // namespace

fs::path default_directory() {
  if (const fs::path base = path_variable("XDG_CACHE_HOME"); !base.empty())
    if (fs::path path = base / "kda-jit"; own_directory(path)) return path;
  // "/" is what containers without a passwd entry have; a home that does not exist is not made.
  std::error_code error;
  if (const fs::path home = path_variable("HOME"); home.has_relative_path() && fs::is_directory(home, error))
    if (fs::path path = home / ".cache" / "kda-jit"; own_directory(path)) return path;
  const fs::path temporary = fs::temp_directory_path(error);
  fs::path path =
      (error ? fs::path("/tmp") : temporary) / fmt::format("kda-jit-{}", static_cast<long>(::geteuid()));
  return private_directory(path) ? path : fs::path();
}

bool on_network(const fs::path& directory) {
  // f_type of NFS, SMB 2, CIFS, Lustre, GPFS, Ceph, BeeGFS, AFS, 9P, FUSE (unknown: assume the worst).
  constexpr std::array<std::uint32_t, 10> kShared = {0x6969,     0xfe534d42, 0xff534d42, 0x0bd00bd0,
                                                     0x47504653, 0x00c36400, 0x19830326, 0x5346414f,
                                                     0x01021997, 0x65735546};
  struct statfs status = {};
  return ::statfs(directory.c_str(), &status) == 0 &&
         std::find(kShared.begin(), kShared.end(), static_cast<std::uint32_t>(status.f_type)) !=
             kShared.end();
}

} // namespace kda::cache
