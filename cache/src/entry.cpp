#include "entry.h"
#include <fmt/format.h>
#include <xxhash.h>

namespace kda::cache {
namespace {

constexpr std::string_view kMagic = "KDAJIT\r\n";
constexpr std::size_t kSizeOffset = 12, kHeaderBytes = 20, kChecksumBytes = sizeof(XXH128_canonical_t);

void put_integer(std::string& out, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i)
    out.push_back(static_cast<char>(value >> (8 * i)));
}

void put_string(std::string& out, std::string_view text) {
  put_integer(out, text.size(), 8);
  out += text;
}

std::string checksum(std::string_view bytes) {
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

} // namespace

std::string encode(std::string_view manifest, const Entry& entry) {
  std::string out(kMagic);
  put_integer(out, kFormatVersion, 4);
  put_integer(out, 0, 8); // the size, known at the end
  put_string(out, manifest);
  put_integer(out, entry.metadata.size(), 4);
  for (const auto& [name, value] : entry.metadata) {
    put_string(out, name);
    put_string(out, value);
  }
  put_string(out, entry.payload);
  std::string size;
  put_integer(size, out.size() + kChecksumBytes, 8);
  out.replace(kSizeOffset, size.size(), size);
  return out + checksum(out);
}

tl::expected<EntryFile, std::string> decode(std::string_view bytes) {
  if (bytes.size() < kHeaderBytes + kChecksumBytes)
    return tl::unexpected(fmt::format("only {} bytes long", bytes.size()));
  const std::string_view body = bytes.substr(0, bytes.size() - kChecksumBytes);
  Reader reader(body);
  if (reader.take(kMagic.size()) != kMagic) return tl::unexpected<std::string>("not a cache entry");
  if (const auto version = reader.integer(4); version != kFormatVersion)
    return tl::unexpected(fmt::format("format {}, this build reads {}", version, kFormatVersion));
  if (const auto size = reader.integer(8); size != bytes.size())
    return tl::unexpected(fmt::format("{} bytes long, {} were written", bytes.size(), size));
  if (checksum(body) != bytes.substr(body.size())) return tl::unexpected<std::string>("checksum differs");
  EntryFile file;
  file.manifest = reader.string();
  const auto count = reader.integer(4);
  for (std::uint64_t i = 0; i < count && reader.ok(); ++i) {
    std::string name = reader.string();
    file.entry.metadata.emplace_back(std::move(name), reader.string());
  }
  file.entry.payload = reader.string();
  if (!reader.at_end()) return tl::unexpected<std::string>("fields do not fill the file");
  return file;
}

} // namespace kda::cache
