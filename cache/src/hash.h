#pragma once
#include <fmt/format.h>
#include <string>
#include <string_view>
#include <xxhash.h>

namespace kda::cache {

/// XXH3-128 as 32 hex digits.
[[nodiscard]] inline std::string hex_digest(std::string_view text) {
  const XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

} // namespace kda::cache
