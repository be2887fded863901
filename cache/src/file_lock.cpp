#include "file_lock.h"
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <fcntl.h>
#include <fmt/format.h>
#include <string>
#include <thread>

namespace kda::cache {
namespace {

/// 0 or errno; never waits.
int set_lock(int fd, short type, off_t byte) {
  struct flock range = {};
  range.l_type = type;
  range.l_whence = SEEK_SET;
  range.l_start = byte;
  range.l_len = 1;
  return ::fcntl(fd, F_OFD_SETLK, &range) == 0 ? 0 : errno;
}

// 28 bits: within the offsets that every lock protocol of network file systems can express. Two keys on the
// same byte only wait for each other.
off_t byte_of(std::string_view digest) {
  return static_cast<off_t>(std::stoul(std::string(digest.substr(0, 7)), nullptr, 16));
}

} // namespace

tl::expected<FileLock, Fault> FileLock::acquire(const std::filesystem::path& file, std::string_view digest,
                                                double wait_seconds) {
  using Clock = std::chrono::steady_clock;
  const auto give_up = Clock::now() + std::chrono::duration<double>(wait_seconds);
  Fd fd(::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666));
  if (!fd.valid()) return tl::unexpected(io_fault("cannot open the cache's lock file", file.native(), errno));
  const off_t byte = byte_of(digest);
  // Polling, because the blocking call has no time limit. A compile takes some 100 ms.
  for (std::chrono::milliseconds pause(1);; pause = std::min(pause * 2, std::chrono::milliseconds(20))) {
    const int error = set_lock(fd.get(), F_WRLCK, byte);
    if (error == 0) return FileLock(std::move(fd), byte);
    if (error != EAGAIN && error != EACCES && error != EINTR)
      return tl::unexpected(io_fault("cannot lock", file.native(), error));
    if (Clock::now() >= give_up)
      return tl::unexpected(
          Fault{std::string(kTimedOut),
                fmt::format("waited {:g} s for another process that makes the same cache entry (lock file "
                            "'{}'); making it here as well",
                            wait_seconds, file.native())});
    std::this_thread::sleep_for(pause);
  }
}

FileLock::FileLock(Fd fd, off_t byte) : fd_(std::move(fd)), byte_(byte) {}

FileLock::~FileLock() {
  // Explicitly: a child that was forked meanwhile shares the description and would keep the lock.
  if (fd_.valid()) set_lock(fd_.get(), F_UNLCK, byte_);
}

} // namespace kda::cache
