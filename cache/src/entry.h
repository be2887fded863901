#pragma once
// One entry is one file, so no reader can see the image of one write with the metadata of another.
//
//   file     = magic version size manifest count metadata* payload checksum
//   magic    = "KDAJIT\r\n"                  8 bytes; \r\n shows text-mode damage
//   version  = u32                           kFormatVersion; any other is a miss
//   size     = u64                           of the whole file
//   manifest = string                        KeyManifest::text(), compared on every hit
//   count    = u32                           number of metadata pairs
//   metadata = string string                 name, value
//   payload  = string                        the image
//   checksum = 16 bytes                      XXH3-128 of everything before, canonical (big endian)
//   string   = u64 bytes                     length, then the bytes; nothing follows the checksum
//
// Integers are little endian. A change of this grammar raises kFormatVersion and with it the schema folder
// (folder.h), so builds of different age share a directory without seeing each other's entries.
#include "cache/store.h"
#include <string_view>
#include <tl/expected.hpp>

namespace kda::cache {

inline constexpr std::uint32_t kFormatVersion = 1;

struct EntryFile {
  std::string manifest;
  Entry entry;
};

[[nodiscard]] std::string encode(std::string_view manifest, const Entry& entry);
/// The error says what is wrong with the file, e.g. "checksum differs".
[[nodiscard]] tl::expected<EntryFile, std::string> decode(std::string_view bytes);

} // namespace kda::cache
