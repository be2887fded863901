#pragma once
// The entries that a store has at hand, those used longest ago leaving when they take more than a limit. An
// entry that somebody holds lives on with him. Not thread-safe.
#include "cache/store.h"
#include <list>
#include <string_view>
#include <unordered_map>

namespace kda::cache {

class MemoryLayer {
public:
  struct Kept {
    std::string manifest;
    std::shared_ptr<const Entry> entry;
    std::uint64_t bytes;
  };

  /// `limit` in bytes, of manifests, images and metadata; 0: none. The newest entry stays whatever its size.
  explicit MemoryLayer(std::uint64_t limit = 0) : limit_(limit) {}

  /// Null without one. Counts as a use.
  [[nodiscard]] std::shared_ptr<const Entry> find(std::string_view manifest);
  /// In place of one that is there.
  void put(const std::string& manifest, std::shared_ptr<const Entry> entry);
  void erase(std::string_view manifest);
  void clear();
  [[nodiscard]] const std::list<Kept>& all() const { return kept_; } ///< the one used last first

private:
  std::uint64_t limit_, bytes_ = 0;
  std::list<Kept> kept_;
  std::unordered_map<std::string_view, std::list<Kept>::iterator> places_; // of the manifests in kept_
};

} // namespace kda::cache
