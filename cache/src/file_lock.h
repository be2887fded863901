#pragma once
// One lock a key among processes. All keys share one lock file, each with a byte of its own (an open file
// description lock on the range), so a key costs no inode. The file is never removed: a lock whose file was
// unlinked is held by two. The system drops the lock when its holder dies, however it dies.
#include "file.h"
#include <string_view>

namespace kda::cache {

class FileLock {
public:
  /// Takes the lock of `digest` (hex digits), waiting at most `wait_seconds` for another holder. The fault's
  /// cause is kTimedOut when the wait ran out; otherwise locks do not work here and the caller goes on
  /// without one.
  [[nodiscard]] static tl::expected<FileLock, Fault> acquire(const std::filesystem::path& file,
                                                             std::string_view digest, double wait_seconds);
  static constexpr std::string_view kTimedOut = "lock wait";

  FileLock(FileLock&&) noexcept = default;
  FileLock& operator=(FileLock&&) = delete;
  ~FileLock();

private:
  FileLock(Fd fd, off_t byte);
  Fd fd_;
  off_t byte_;
};

} // namespace kda::cache
