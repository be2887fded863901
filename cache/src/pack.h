#pragma once
// A pack: many entries in one file that nobody changes, shipped with a program or a container image.
//
//   pack     = magic version size index labels blobs entries digest blob*
//   magic    = "KDAPACK\n"                8 bytes
//   version  = u32                        kPackVersion; any other is not read
//   size     = u64                        of the whole file
//   index    = u64                        bytes from the start of the file to the end of `digest`
//   labels   = count (string string)*     what the entries are for, see kLabelFields: name, value
//   blobs    = count (u64 checksum)*      bytes and XXH3-128 of each blob
//   entries  = count entry*               in ascending order of their digests
//   entry    = digest parts metadata u32  the last: the blob that is the image
//   parts    = count u32*                 blobs whose concatenation is KeyManifest::text(), compared on every
//   hit metadata = count (u32 u32)*           blobs of name and value digest   = 16 bytes of an entry:
//   XXH3-128 of its manifest; at the end: of all bytes before blob     = bytes                      in the
//   order of `blobs`, without gaps to the end of the file count    = u32 string   = u64 bytes length, then
//   the bytes
//
// Integers are little endian, checksums and digests canonical (big endian). The keys of a model's kernels
// have most source files in common: a blob is a field of a key, and stands in the file once. The digest
// covers the checksums of the blobs, so it is that of the whole file, and opening a pack reads only its
// index.
#include "cache/pack.h"
#include "cache/store.h"
#include "entry.h"
#include "file.h"

namespace kda::cache {

inline constexpr std::uint32_t kPackVersion = 1;

/// Immutable and free of locks. Nothing is mapped into memory: a file that is cut, replaced or stale while it
/// is open gives a fault, where a mapping would kill the process.
class Pack {
public:
  /// Reads and verifies the index.
  [[nodiscard]] static tl::expected<Pack, Fault> open(const std::filesystem::path& file);

  [[nodiscard]] const PackInfo& info() const { return info_; }
  /// The entry; nullopt when there is none; a fault when there is one that cannot be trusted.
  [[nodiscard]] tl::expected<std::optional<Entry>, Fault> load(const KeyManifest& key) const;
  /// Why no key like this one can be in the pack, e.g. that it was made for other architectures. Empty when
  /// one could, or when the pack is of another kind altogether.
  [[nodiscard]] std::optional<Fault> misfit(const KeyManifest& key) const;
  /// Entry number `index`, verified; less than info().entries.
  [[nodiscard]] tl::expected<EntryFile, Fault> read(std::size_t index) const;

private:
  struct Blob {
    std::uint64_t offset, size;
    std::string checksum;
  };
  struct Item {
    std::string digest; ///< hex
    std::vector<std::uint32_t> parts;
    std::vector<std::pair<std::uint32_t, std::uint32_t>> metadata;
    std::uint32_t payload = 0;
  };

  explicit Pack(Fd fd) : fd_(std::move(fd)) {}
  /// What is wrong with the index; empty when it is good.
  [[nodiscard]] std::string parse(std::string_view index);
  [[nodiscard]] tl::expected<std::string, Fault> read_blob(std::uint32_t number) const;
  [[nodiscard]] Fault flaw(std::string_view why) const;

  Fd fd_;
  PackInfo info_;
  std::vector<Blob> blobs_;
  std::vector<Item> items_;
};

/// Writes a pack whole or not at all; equal entries give equal bytes, whatever their order.
[[nodiscard]] tl::expected<PackInfo, Fault> write_pack(const std::filesystem::path& file,
                                                       std::vector<EntryFile> entries);

} // namespace kda::cache
