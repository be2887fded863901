#include "file.h"
#include <cerrno>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <system_error>

namespace kda::cache {
namespace {
// Far above any kernel image; a stray large file is refused before memory is reserved for it.
constexpr off_t kLargestFile = off_t{1} << 30;
} // namespace

Fault io_fault(std::string_view what, std::string_view path, int error) {
  std::string text = std::generic_category().message(error);
  return {text, fmt::format("{} '{}': {}", what, path, text)};
}

tl::expected<std::optional<std::string>, Fault> read_file(const std::filesystem::path& path) {
  const auto fault = [&](int error) {
    return tl::unexpected(io_fault("cannot read the cache entry", path.native(), error));
  };
  // O_NONBLOCK: a FIFO under the name must not block the open.
  const Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file.valid()) {
    if (errno == ENOENT || errno == ENOTDIR) return std::nullopt;
    return fault(errno);
  }
  struct stat status = {};
  if (::fstat(file.get(), &status) != 0) return fault(errno);
  if (!S_ISREG(status.st_mode)) return fault(S_ISDIR(status.st_mode) ? EISDIR : EINVAL);
  if (status.st_size > kLargestFile) return fault(EFBIG);
  std::string bytes(static_cast<std::size_t>(status.st_size), '\0');
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t count = ::read(file.get(), bytes.data() + done, bytes.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return fault(errno);
    if (count == 0) break; // shortened under us: the checksum finds it
    done += static_cast<std::size_t>(count);
  }
  bytes.resize(done);
  return bytes;
}

} // namespace kda::cache
