#pragma once
// Makes system calls fail while a Failing lives. The shim defines the calls in this executable, ahead of
// libc's, and passes everything else on to the kernel.
#include <chrono>
#include <functional>
#include <map>
#include <string>

namespace kda::cache::test {

enum class Call {
  rename,
  rename_done, ///< is done, then reported as failed
  fsync,
  write,
  read,
  read_pack, ///< pread
  lock,
  open_entry ///< of a file *.kda, for reading
};

class Failing {
public:
  /// Each call with its errno.
  explicit Failing(std::map<Call, int> errors);
  Failing(Call call, int error) : Failing(std::map<Call, int>{{call, error}}) {}
  Failing(const Failing&) = delete;
  Failing& operator=(const Failing&) = delete;
  ~Failing();
  /// How often calls were refused: a test that never reached one proves nothing.
  [[nodiscard]] int count() const;
};

/// While it lives, `before` is told of every file that is about to be removed.
class OnRemove {
public:
  explicit OnRemove(std::function<void(const std::string& path)> before);
  OnRemove(const OnRemove&) = delete;
  OnRemove& operator=(const OnRemove&) = delete;
  ~OnRemove();
};

/// While it lives, the file system's clock, by which a file is touched, is ahead of this machine's by so
/// much.
class FileClock {
public:
  explicit FileClock(std::chrono::seconds ahead);
  FileClock(const FileClock&) = delete;
  FileClock& operator=(const FileClock&) = delete;
  ~FileClock();
};

} // namespace kda::cache::test
