#pragma once
// A file that appears whole or not at all: written under a temporary name in the directory of its target
// (rename is atomic only within a file system), synced, then renamed. Without commit() it is removed.
#include "file.h"
#include <string_view>

namespace kda::cache {

class AtomicFile {
public:
  static constexpr std::string_view kTemporarySuffix = ".tmp";

  /// Opens "<target>.<random>.tmp". The directory of the target must exist.
  [[nodiscard]] static tl::expected<AtomicFile, Fault> create(const std::filesystem::path& target);
  AtomicFile(AtomicFile&&) noexcept = default;
  AtomicFile& operator=(AtomicFile&&) = delete;
  ~AtomicFile();

  [[nodiscard]] tl::expected<void, Fault> write(std::string_view bytes);
  /// After success the target holds exactly what was written. After a failure the target is untouched.
  [[nodiscard]] tl::expected<void, Fault> commit();

private:
  AtomicFile(Fd fd, std::filesystem::path temporary, std::filesystem::path target);
  [[nodiscard]] tl::unexpected<Fault> fault(int error) const;

  Fd fd_;
  std::filesystem::path temporary_; ///< empty once committed
  std::filesystem::path target_;
};

} // namespace kda::cache
