#pragma once
// Makes a system call fail while a Failing lives. The shim defines the calls in this executable, ahead of
// libc's, and passes everything else on to the kernel.

namespace kda::cache::test {

enum class Call { rename, fsync, write, read, lock };

class Failing {
public:
  Failing(Call call, int error);
  Failing(const Failing&) = delete;
  Failing& operator=(const Failing&) = delete;
  ~Failing();
  /// How often the call was refused: a test that never reached it proves nothing.
  [[nodiscard]] int count() const;
};

} // namespace kda::cache::test
