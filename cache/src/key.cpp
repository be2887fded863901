#include "cache/key.h"
#include <fmt/format.h>
#include <xxhash.h>

namespace kda::cache {

void KeyManifest::add(std::string_view name, std::string_view value) {
  text_ += fmt::format("{} {}\n{}\n", name, value.size(), value);
}

std::string KeyManifest::digest() const {
  const XXH128_hash_t hash = XXH3_128bits(text_.data(), text_.size());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

} // namespace kda::cache
