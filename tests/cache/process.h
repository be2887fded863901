#pragma once
// A child process for one test.
#include <csignal>
#include <exception>
#include <fcntl.h>
#include <new>
#include <pthread.h>
#include <sys/mman.h>
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
  [[nodiscard]] int entrance() const { return ends_[1]; } ///< a byte written here opens it
  void wait() {
    char byte = 0;
    (void)!::read(ends_[0], &byte, 1);
  }

private:
  int ends_[2] = {-1, -1};
};

/// An object that a process and its children share.
template <class T>
class SharedMemory {
public:
  SharedMemory()
      : data_(new (::mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) T) {
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { ::munmap(data_, sizeof(T)); }
  T* operator->() const { return data_; }

private:
  T* data_;
};

/// In shared memory: each round goes on when `count` processes wait.
class Barrier {
public:
  explicit Barrier(unsigned count) {
    pthread_barrierattr_t attributes;
    ::pthread_barrierattr_init(&attributes);
    ::pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    ::pthread_barrier_init(&barrier_, &attributes, count);
    ::pthread_barrierattr_destroy(&attributes);
  }
  void wait() { ::pthread_barrier_wait(&barrier_); }

private:
  pthread_barrier_t barrier_;
};

} // namespace kda::cache::test
