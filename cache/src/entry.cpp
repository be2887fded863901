#include "entry.h"
#include "bytes.h"
#include <fmt/format.h>

namespace kda::cache {
namespace {

constexpr std::string_view kMagic = "KDAJIT\r\n";
constexpr std::size_t kSizeOffset = 12, kHeaderBytes = 20;

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
