#pragma once
// One schema folder: "<directory>/v1/<x>/<y>/<digest>.kda" with x and y the first two digits of the digest
// (256 folders at most), and "<directory>/v1/lock". The same layout serves the user directory and the
// read-only ones.
#include "cache/store.h"
#include "entry.h"
#include "fault.h"
#include <tl/expected.hpp>

namespace kda::cache {

class Folder {
public:
  /// Touches nothing on disk.
  explicit Folder(const std::filesystem::path& directory);

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] std::filesystem::path lock_file() const { return path_ / "lock"; }
  [[nodiscard]] std::filesystem::path entry_file(const std::string& digest) const;

  /// Makes the folder and, beside it, CACHEDIR.TAG, by which backup programs know to leave it out.
  [[nodiscard]] tl::expected<void, Fault> create() const;
  /// The entry; nullopt when there is none; a fault when there is one that cannot be trusted.
  [[nodiscard]] tl::expected<std::optional<Entry>, Fault> load(const KeyManifest& key) const;
  [[nodiscard]] tl::expected<void, Fault> publish(const KeyManifest& key, const Entry& entry) const;

  /// What the file of an entry holds, or what is wrong with it; nullopt when there is no such file.
  [[nodiscard]] static tl::expected<std::optional<EntryFile>, std::string>
  examine(const std::filesystem::path& file);
  struct Listing {
    std::vector<std::filesystem::path> entries, temporaries;
  };
  [[nodiscard]] Listing list() const;

private:
  std::filesystem::path path_;
};

} // namespace kda::cache
