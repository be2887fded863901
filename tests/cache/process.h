#pragma once
// A child process for one test.
#include <csignal>
#include <exception>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

namespace kda::cache::test {

/// Forks at construction; the child runs `body` and exits with what it returns (99 after an exception).
class Process {
public:
  template <class Body>
  explicit Process(const Body& body) : pid_(::fork()) {
    if (pid_ != 0) return;
    int code = 99;
    try {
      code = body();
    } catch (const std::exception&) {
    }
    ::_exit(code);
  }
  Process(Process&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}
  Process& operator=(Process&&) = delete;
  ~Process() { kill(); }

  /// The exit code; -1 when a signal ended it.
  int wait() {
    int status = 0;
    while (pid_ > 0 && ::waitpid(pid_, &status, 0) < 0) {
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  void kill() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      (void)wait();
    }
  }

private:
  pid_t pid_;
};

/// One process tells others to go on: wait() returns after open(), or when the last writer has died.
class Gate {
public:
  Gate() {
    if (::pipe2(ends_, O_CLOEXEC) != 0) std::terminate();
  }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;
  ~Gate() {
    ::close(ends_[0]);
    ::close(ends_[1]);
  }
  void open() { (void)!::write(ends_[1], "................................", 32); }
  void wait() {
    char byte = 0;
    (void)!::read(ends_[0], &byte, 1);
  }

private:
  int ends_[2] = {-1, -1};
};

} // namespace kda::cache::test
