#pragma once
// The few file operations of the cache, with every error looked at. Descriptors are close-on-exec, so a
// compiler or a user's child process never keeps a lock or a temporary file alive.
#include "fault.h"
#include <filesystem>
#include <optional>
#include <string>
#include <tl/expected.hpp>
#include <unistd.h>
#include <utility>

namespace kda::cache {

/// Owns a file descriptor.
class Fd {
public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() {
    if (fd_ >= 0) ::close(fd_);
  }
  [[nodiscard]] int get() const { return fd_; }
  [[nodiscard]] bool valid() const { return fd_ >= 0; }

private:
  int fd_;
};

/// The whole of a regular file; nullopt when there is none.
[[nodiscard]] tl::expected<std::optional<std::string>, Fault> read_file(const std::filesystem::path& path);

} // namespace kda::cache
