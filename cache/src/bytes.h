#pragma once
// The bytes of the cache's file formats: little-endian integers, strings after their length, checksums.
#include <cstdint>
#include <string>
#include <string_view>
#include <xxhash.h>

namespace kda::cache {

inline constexpr std::size_t kChecksumBytes = sizeof(XXH128_canonical_t);

inline void put_integer(std::string& out, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i)
    out.push_back(static_cast<char>(value >> (8 * i)));
}

inline void put_string(std::string& out, std::string_view text) {
  put_integer(out, text.size(), 8);
  out += text;
}

/// XXH3-128 in its canonical (big endian) form.
[[nodiscard]] inline std::string checksum(std::string_view bytes) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(bytes.data(), bytes.size()));
  return {reinterpret_cast<const char*>(canonical.digest), kChecksumBytes};
}

/// Takes fields off the front; past the end everything is empty and ok() is false.
class Reader {
public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}

  std::uint64_t integer(int bytes) {
    std::uint64_t value = 0;
    const std::string_view taken = take(static_cast<std::uint64_t>(bytes));
    for (std::size_t i = 0; i < taken.size(); ++i)
      value |= std::uint64_t{static_cast<unsigned char>(taken[i])} << (8 * i);
    return value;
  }
  std::string string() { return std::string(take(integer(8))); }
  std::string_view take(std::uint64_t count) {
    if (count > rest_.size()) {
      ok_ = false;
      rest_ = {};
      return {};
    }
    const std::string_view taken = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return taken;
  }
  [[nodiscard]] bool ok() const { return ok_; }
  [[nodiscard]] bool at_end() const { return ok_ && rest_.empty(); }

private:
  std::string_view rest_;
  bool ok_ = true;
};

} // namespace kda::cache
