#pragma once
// Makes system calls fail while a Failing lives. The shim defines the calls in this executable, ahead of
// libc's, and passes everything else on to the kernel.
#include <map>

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

} // namespace kda::cache::test
