#include "cache/key.h"
#include "hash.h"

namespace kda::cache {

void KeyManifest::add(std::string_view name, std::string_view value) {
  text_ += fmt::format("{} {}\n{}\n", name, value.size(), value);
}

std::string KeyManifest::digest() const {
  return hex_digest(text_);
}

} // namespace kda::cache
