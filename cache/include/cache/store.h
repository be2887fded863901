#pragma once
// Entries on disk and in memory: bytes in, bytes out. Any doubt about an entry is a miss and one warning, any
// doubt about the disk is "work without it"; nothing here fails a caller. Format: docs/cache.md and
// entry.h.
#include "cache/key.h"
#include "cache/pack.h"
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tl/expected.hpp>
#include <utility>
#include <vector>

namespace kda::cache {

struct Entry {
  std::string payload; ///< the image
  std::vector<std::pair<std::string, std::string>>
      metadata; ///< small named strings, e.g. register counts, log
};

enum class Source : std::uint8_t { made, memory, disk, read_only, pack };

struct StoreOptions {
  std::filesystem::path directory = {}; ///< empty: memory only. A schema sub-folder is made under it.
  std::vector<std::filesystem::path> read_only = {};
  std::vector<std::filesystem::path> packs = {};     ///< files, read after the directories
  std::function<void(const std::string&)> warn = {}; ///< once a cause
  double lock_wait_seconds = 120;                    ///< then a waiter makes its own
  std::uint64_t max_bytes =
      0; ///< of the user directory; publishing then removes what was least used. 0: none
  std::uint64_t max_memory_bytes = 0; ///< of the entries at hand; what was least used is read again. 0: none
};

struct StoreStats {
  std::int64_t entries = 0, bytes = 0; ///< on disk, user directory
  // Of this store.
  std::int64_t memory_hits = 0, disk_hits = 0, read_only_hits = 0, pack_hits = 0, misses = 0, corrupt = 0;
};
struct PruneReport {
  std::int64_t removed = 0, interrupted = 0; ///< entries, and files that killed writers left behind
  std::uint64_t freed = 0, bytes = 0;        ///< on disk: given back, and still taken by entries
};
struct UnpackReport {
  std::int64_t added = 0, present = 0; ///< present: the user directory had a good one
};
struct VerifyReport {
  std::int64_t good = 0;
  std::vector<std::string> bad; ///< "path: why"
};

class Store {
public:
  explicit Store(StoreOptions options);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  /// The entry, or what `make` made; null when `make` answered nullopt (each waiter then runs its own
  /// `make`). Single flight: per key one `make` at a time among the threads of this process and, through a
  /// lock file, among processes.
  [[nodiscard]] std::shared_ptr<const Entry> get_or_make(const KeyManifest& key,
                                                         const std::function<std::optional<Entry>()>& make,
                                                         Source* source = nullptr);
  [[nodiscard]] std::shared_ptr<const Entry> get(const KeyManifest& key, Source* source = nullptr);
  /// Drops an entry that a loader refused, from memory and from the user directory.
  void discard(const KeyManifest& key, const std::string& why);

  [[nodiscard]] StoreStats stats() const;
  /// Every entry of the user directory and of the packs; nothing is removed from a pack.
  [[nodiscard]] VerifyReport verify(bool remove_bad);
  /// Removes entries least recently used until the user directory takes at most `max_bytes` of disk (0: no
  /// limit), except what is in use (docs/cache.md, Size), and files of interrupted writes.
  PruneReport prune(std::uint64_t max_bytes);
  /// Removes every entry (not the tuning rows); returns how many.
  std::int64_t clear();
  /// Writes the good entries of every layer that are asked for into one file, whole or not at all. The error
  /// is a sentence.
  tl::expected<PackInfo, std::string> pack(const std::filesystem::path& file, const PackRequest& request);
  /// Puts every entry of a pack into the user directory. Nothing is written when any of it is damaged.
  tl::expected<UnpackReport, std::string> unpack(const std::filesystem::path& file);
  /// The packs in use; one that could not be read is not among them.
  [[nodiscard]] std::vector<PackInfo> packs() const;
  /// The schema folder in use; empty when memory only.
  [[nodiscard]] std::filesystem::path directory() const;

private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Where the cache lives: `explicit_dir`, else $XDG_CACHE_HOME/kda-jit, else $HOME/.cache/kda-jit, else a
/// per-user directory under the temp directory whose owner and mode are checked, else empty (memory only).
[[nodiscard]] std::filesystem::path default_directory();
/// Whether the directory lies on a file system shared between machines, as far as its type tells.
[[nodiscard]] bool on_network(const std::filesystem::path& directory);

} // namespace kda::cache
