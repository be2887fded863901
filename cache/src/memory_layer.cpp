#include "memory_layer.h"

namespace kda::cache {

std::shared_ptr<const Entry> MemoryLayer::find(std::string_view manifest) {
  const auto place = places_.find(manifest);
  if (place == places_.end()) return nullptr;
  kept_.splice(kept_.begin(), kept_, place->second);
  return place->second->entry;
}

void MemoryLayer::put(const std::string& manifest, std::shared_ptr<const Entry> entry) {
  erase(manifest);
  std::uint64_t bytes = manifest.size() + entry->payload.size();
  for (const auto& [name, value] : entry->metadata)
    bytes += name.size() + value.size();
  kept_.push_front({manifest, std::move(entry), bytes});
  places_.emplace(kept_.front().manifest, kept_.begin());
  bytes_ += bytes;
  while (limit_ != 0 && bytes_ > limit_ && kept_.size() > 1)
    erase(kept_.back().manifest);
}

void MemoryLayer::erase(std::string_view manifest) {
  const auto place = places_.find(manifest);
  if (place == places_.end()) return;
  const auto kept = place->second;
  places_.erase(place); // before the string that its key views
  bytes_ -= kept->bytes;
  kept_.erase(kept);
}

void MemoryLayer::clear() {
  places_.clear();
  kept_.clear();
  bytes_ = 0;
}

} // namespace kda::cache
