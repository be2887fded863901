#include "shim.h"
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <ctime>
#include <fcntl.h>
#include <string_view>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <utility>

namespace kda::cache::test {
namespace {
std::map<Call, int> failing_errors;
int failures = 0;
std::function<void(const std::string&)> before_remove;
std::chrono::seconds clock_ahead{0};

bool refuse(Call call) {
  const auto found = failing_errors.find(call);
  if (found == failing_errors.end()) return false;
  ++failures;
  errno = found->second;
  return true;
}

int open_file(const char* path, int flags, mode_t mode) {
  const bool entry = (flags & O_ACCMODE) == O_RDONLY && std::string_view(path).ends_with(".kda");
  if (entry && refuse(Call::open_entry)) return -1;
  return static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}
} // namespace

Failing::Failing(std::map<Call, int> errors) {
  failing_errors = std::move(errors);
  failures = 0;
}
Failing::~Failing() {
  failing_errors.clear();
}
int Failing::count() const {
  return failures;
}

OnRemove::OnRemove(std::function<void(const std::string&)> before) {
  before_remove = std::move(before);
}
OnRemove::~OnRemove() {
  before_remove = nullptr;
}

FileClock::FileClock(std::chrono::seconds ahead) {
  clock_ahead = ahead;
}
FileClock::~FileClock() {
  clock_ahead = {};
}

} // namespace kda::cache::test

using namespace kda::cache::test;

extern "C" {

int rename(const char* from, const char* to) noexcept {
  if (refuse(Call::rename)) return -1;
  const auto done = static_cast<int>(::syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
  return refuse(Call::rename_done) ? -1 : done;
}

int remove(const char* path) noexcept {
  if (before_remove) before_remove(path);
  const auto done = ::syscall(SYS_unlinkat, AT_FDCWD, path, 0);
  return static_cast<int>(done != 0 && errno == EISDIR ? ::syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR)
                                                       : done);
}

int utimensat(int folder, const char* path, const timespec* times, int flags) noexcept {
  timespec now[2] = {};
  if (times == nullptr && clock_ahead.count() != 0) {
    ::clock_gettime(CLOCK_REALTIME, now);
    now[0].tv_sec += clock_ahead.count();
    now[1] = now[0];
    times = now;
  }
  return static_cast<int>(::syscall(SYS_utimensat, folder, path, times, flags));
}

int open(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const auto mode = (flags & O_CREAT) != 0 ? va_arg(list, mode_t) : 0;
  va_end(list);
  return open_file(path, flags, mode);
}

int open64(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const auto mode = (flags & O_CREAT) != 0 ? va_arg(list, mode_t) : 0;
  va_end(list);
  return open_file(path, flags, mode);
}

int fsync(int fd) {
  return refuse(Call::fsync) ? -1 : static_cast<int>(::syscall(SYS_fsync, fd));
}

// Of a write that fails, half arrives. The first three descriptors belong to the test framework.
ssize_t write(int fd, const void* bytes, size_t count) {
  if (fd > 2 && refuse(Call::write)) {
    const int error = errno;
    (void)!::syscall(SYS_write, fd, bytes, count / 2);
    errno = error;
    return -1;
  }
  return ::syscall(SYS_write, fd, bytes, count);
}

ssize_t read(int fd, void* bytes, size_t count) {
  return refuse(Call::read) ? -1 : ::syscall(SYS_read, fd, bytes, count);
}

ssize_t pread(int fd, void* bytes, size_t count, off_t offset) {
  return refuse(Call::read_pack) ? -1 : ::syscall(SYS_pread64, fd, bytes, count, offset);
}

ssize_t pread64(int fd, void* bytes, size_t count, off_t offset) {
  return pread(fd, bytes, count, offset);
}

int fcntl(int fd, int command, ...) {
  va_list list;
  va_start(list, command);
  void* argument = va_arg(list, void*);
  va_end(list);
  if (command == F_OFD_SETLK && refuse(Call::lock)) return -1;
  return static_cast<int>(::syscall(SYS_fcntl, fd, command, argument));
}

int fcntl64(int fd, int command, ...) {
  va_list list;
  va_start(list, command);
  void* argument = va_arg(list, void*);
  va_end(list);
  if (command == F_OFD_SETLK && refuse(Call::lock)) return -1;
  return static_cast<int>(::syscall(SYS_fcntl, fd, command, argument));
}
}
