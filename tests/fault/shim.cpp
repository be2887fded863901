#include "shim.h"
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace kda::cache::test {
namespace {
Call failing_call;
int failing_error = 0; // 0: nothing fails
int failures = 0;

bool refuse(Call call) {
  if (failing_error == 0 || call != failing_call) return false;
  ++failures;
  errno = failing_error;
  return true;
}
} // namespace

Failing::Failing(Call call, int error) {
  failing_call = call;
  failing_error = error;
  failures = 0;
}
Failing::~Failing() {
  failing_error = 0;
}
int Failing::count() const {
  return failures;
}

} // namespace kda::cache::test

using namespace kda::cache::test;

extern "C" {

int rename(const char* from, const char* to) noexcept {
  if (refuse(Call::rename)) return -1;
  return static_cast<int>(::syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}

int fsync(int fd) {
  return refuse(Call::fsync) ? -1 : static_cast<int>(::syscall(SYS_fsync, fd));
}

// Of a write that fails, half arrives. The first three descriptors belong to the test framework.
ssize_t write(int fd, const void* bytes, size_t count) {
  if (fd > 2 && refuse(Call::write)) {
    (void)!::syscall(SYS_write, fd, bytes, count / 2);
    errno = failing_error;
    return -1;
  }
  return ::syscall(SYS_write, fd, bytes, count);
}

ssize_t read(int fd, void* bytes, size_t count) {
  return refuse(Call::read) ? -1 : ::syscall(SYS_read, fd, bytes, count);
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
