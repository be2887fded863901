#include "atomic_file.h"
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <fcntl.h>
#include <fmt/format.h>
#include <random>

namespace kda::cache {

tl::expected<AtomicFile, Fault> AtomicFile::create(const std::filesystem::path& target) {
  std::random_device random; // the system's generator: never the same in two forks
  for (;;) {
    const std::uint64_t tag = (std::uint64_t{random()} << 32) | random();
    const std::filesystem::path temporary =
        fmt::format("{}.{:016x}{}", target.native(), tag, kTemporarySuffix);
    // 0666 and the umask, not 0600: a directory that one user fills may be another's read-only layer.
    Fd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (fd.valid()) return AtomicFile(std::move(fd), temporary, target);
    if (errno != EEXIST) return tl::unexpected(io_fault("cannot write", target.native(), errno));
  }
}

AtomicFile::AtomicFile(Fd fd, std::filesystem::path temporary, std::filesystem::path target)
    : fd_(std::move(fd)), temporary_(std::move(temporary)), target_(std::move(target)) {}

AtomicFile::~AtomicFile() {
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

tl::unexpected<Fault> AtomicFile::fault(int error) const {
  return tl::unexpected(io_fault("cannot write", target_.native(), error));
}

tl::expected<void, Fault> AtomicFile::write(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(fd_.get(), bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return fault(errno);
    bytes.remove_prefix(static_cast<std::size_t>(count));
  }
  return {};
}

tl::expected<void, Fault> AtomicFile::commit() {
  // Without the sync a crash can leave the new name with no bytes behind it. Some file systems have none.
  if (::fsync(fd_.get()) != 0 && errno != EINVAL && errno != ENOTSUP) return fault(errno);
  if (std::rename(temporary_.c_str(), target_.c_str()) != 0) return fault(errno);
  temporary_.clear();
  return {};
}

} // namespace kda::cache
