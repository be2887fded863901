#include "pack.h"
#include "atomic_file.h"
#include "bytes.h"
#include "hash.h"
#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <map>
#include <set>
#include <sys/stat.h>
#include <unordered_map>

namespace kda::cache {
namespace {

constexpr std::string_view kMagic = "KDAPACK\n";
constexpr std::size_t kSizeOffset = 12, kHeaderBytes = 28;
// Far above any index; a damaged length must not reserve memory.
constexpr std::uint64_t kLargestIndex = std::uint64_t{1} << 28;

std::string hex(std::string_view canonical) {
  std::string out;
  for (const char c : canonical)
    out += fmt::format("{:02x}", static_cast<unsigned char>(c));
  return out;
}

Fault cannot_read(const std::filesystem::path& file, int error) {
  return {file.native(), io_fault("cannot read the pack", file.native(), error).sentence};
}

/// `count` bytes from `offset`; fewer when the file ends before.
tl::expected<std::string, Fault> read_at(const Fd& fd, const std::filesystem::path& file,
                                         std::uint64_t offset, std::uint64_t count) {
  std::string bytes(count, '\0');
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got =
        ::pread(fd.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return tl::unexpected(cannot_read(file, errno));
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  bytes.resize(done);
  return bytes;
}

/// The blobs of a pack that is being written, each once.
class Blobs {
public:
  std::uint32_t add(std::string_view bytes) {
    const auto [found, fresh] =
        numbers_.try_emplace(std::string(bytes), static_cast<std::uint32_t>(order_.size()));
    if (fresh) order_.push_back(&found->first); // the nodes of the map stay where they are
    return found->second;
  }
  [[nodiscard]] const std::vector<const std::string*>& all() const { return order_; }

private:
  std::unordered_map<std::string, std::uint32_t> numbers_;
  std::vector<const std::string*> order_;
};

std::string encode_entry(const EntryFile& file, Blobs& blobs) {
  std::string out = checksum(file.manifest);
  const auto fields = key_fields(file.manifest);
  // A manifest that is no list of fields cannot come from a KeyManifest; as one blob it is kept all the same.
  std::vector<std::string_view> parts;
  for (const KeyField& field : fields.value_or(std::vector<KeyField>{{{}, {}, file.manifest}}))
    parts.push_back(field.text);
  put_integer(out, parts.size(), 4);
  for (const std::string_view part : parts)
    put_integer(out, blobs.add(part), 4);
  put_integer(out, file.entry.metadata.size(), 4);
  for (const auto& [name, value] : file.entry.metadata) {
    put_integer(out, blobs.add(name), 4);
    put_integer(out, blobs.add(value), 4);
  }
  put_integer(out, blobs.add(file.entry.payload), 4);
  return out;
}

std::vector<std::pair<std::string, std::string>> labels_of(const std::vector<EntryFile>& entries) {
  std::map<std::string_view, std::set<std::string_view>> values;
  for (const EntryFile& file : entries)
    for (const KeyField& field : key_fields(file.manifest).value_or(std::vector<KeyField>{}))
      if (std::find(kLabelFields.begin(), kLabelFields.end(), field.name) != kLabelFields.end())
        values[field.name].insert(field.value);
  std::vector<std::pair<std::string, std::string>> labels;
  for (const std::string_view name : kLabelFields)
    for (const std::string_view value : values[name])
      labels.emplace_back(name, value);
  return labels;
}

} // namespace

Fault Pack::flaw(std::string_view why) const {
  return {info_.file.native(),
          fmt::format("ignoring the pack '{}' or what is damaged of it: {}; make it anew "
                      "with `kda-jit cache pack`",
                      info_.file.native(), why)};
}

tl::expected<Pack, Fault> Pack::open(const std::filesystem::path& file) {
  // O_NONBLOCK: a FIFO under the name must not block the open.
  Pack pack(Fd(::open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)));
  pack.info_.file = file;
  struct stat status = {};
  if (!pack.fd_.valid() || ::fstat(pack.fd_.get(), &status) != 0)
    return tl::unexpected(cannot_read(file, errno));
  if (!S_ISREG(status.st_mode)) return tl::unexpected(cannot_read(file, EINVAL));
  const auto header = read_at(pack.fd_, file, 0, kHeaderBytes);
  if (!header) return tl::unexpected(header.error());
  Reader reader(*header);
  if (reader.take(kMagic.size()) != kMagic) return tl::unexpected(pack.flaw("it is no pack"));
  if (const auto version = reader.integer(4); version != kPackVersion && reader.ok())
    return tl::unexpected(
        pack.flaw(fmt::format("it has format {}, this build reads {}", version, kPackVersion)));
  pack.info_.bytes = reader.integer(8);
  const std::uint64_t index_bytes = reader.integer(8);
  if (!reader.ok() || pack.info_.bytes != static_cast<std::uint64_t>(status.st_size))
    return tl::unexpected(
        pack.flaw(fmt::format("{} bytes long, {} were written", status.st_size, pack.info_.bytes)));
  if (index_bytes > pack.info_.bytes || index_bytes > kLargestIndex ||
      index_bytes < kHeaderBytes + kChecksumBytes)
    return tl::unexpected(pack.flaw("its index does not fit in it"));
  const auto index = read_at(pack.fd_, file, 0, index_bytes);
  if (!index) return tl::unexpected(index.error());
  if (const std::string why = pack.parse(*index); !why.empty()) return tl::unexpected(pack.flaw(why));
  return pack;
}

std::string Pack::parse(std::string_view index) {
  if (index.size() < kHeaderBytes + kChecksumBytes) return "it was cut while it was read";
  const std::string_view body = index.substr(0, index.size() - kChecksumBytes);
  const std::string_view digest = index.substr(body.size());
  if (checksum(body) != digest) return "the checksum of its index differs";
  info_.digest = hex(digest);
  // From here on a writer of ours is vouched for; the bounds are looked at all the same.
  Reader reader(body.substr(kHeaderBytes));
  for (auto count = reader.integer(4); count > 0 && reader.ok(); --count) {
    std::string name = reader.string();
    info_.labels.emplace_back(std::move(name), reader.string());
  }
  std::uint64_t offset = index.size();
  for (auto count = reader.integer(4); count > 0 && reader.ok(); --count) {
    const std::uint64_t size = reader.integer(8);
    if (size > info_.bytes - offset) return "its blobs do not fit in it";
    blobs_.push_back({offset, size, std::string(reader.take(kChecksumBytes))});
    offset += size;
  }
  bool bounded = true;
  const auto blob = [&] {
    const auto number = static_cast<std::uint32_t>(reader.integer(4));
    bounded &= number < blobs_.size();
    return number;
  };
  for (auto entries = reader.integer(4); entries > 0 && reader.ok(); --entries) {
    Item item;
    item.digest = hex(reader.take(kChecksumBytes));
    for (auto count = reader.integer(4); count > 0 && reader.ok(); --count)
      item.parts.push_back(blob());
    for (auto count = reader.integer(4); count > 0 && reader.ok(); --count) {
      const std::uint32_t name = blob();
      item.metadata.emplace_back(name, blob());
    }
    item.payload = blob();
    items_.push_back(std::move(item));
  }
  info_.entries = items_.size();
  const bool sorted = std::is_sorted(items_.begin(), items_.end(),
                                     [](const Item& a, const Item& b) { return a.digest < b.digest; });
  if (!reader.at_end() || !bounded || !sorted || offset != info_.bytes) return "its fields do not fit";
  return {};
}

tl::expected<std::string, Fault> Pack::read_blob(std::uint32_t number) const {
  const Blob& blob = blobs_[number];
  auto bytes = read_at(fd_, info_.file, blob.offset, blob.size);
  if (bytes && checksum(*bytes) != blob.checksum)
    return tl::unexpected(flaw("a checksum differs; it was damaged, or replaced while it was open"));
  return bytes;
}

tl::expected<EntryFile, Fault> Pack::read(std::size_t index) const {
  const Item& item = items_[index];
  std::optional<Fault> fault;
  const auto text = [&](std::uint32_t number) {
    auto bytes = fault ? std::string() : read_blob(number);
    if (bytes) return *std::move(bytes);
    fault = bytes.error();
    return std::string();
  };
  EntryFile file;
  for (const std::uint32_t part : item.parts)
    file.manifest += text(part);
  for (const auto& [name, value] : item.metadata) {
    std::string first = text(name);
    file.entry.metadata.emplace_back(std::move(first), text(value));
  }
  file.entry.payload = text(item.payload);
  if (fault) return tl::unexpected(*fault);
  if (hex_digest(file.manifest) != item.digest)
    return tl::unexpected(flaw("an entry has another key's digest"));
  return file;
}

tl::expected<std::optional<Entry>, Fault> Pack::load(const KeyManifest& key) const {
  const std::string digest = key.digest();
  const auto found = std::lower_bound(items_.begin(), items_.end(), digest,
                                      [](const Item& item, const std::string& d) { return item.digest < d; });
  if (found == items_.end() || found->digest != digest) return std::nullopt;
  auto file = read(static_cast<std::size_t>(found - items_.begin()));
  if (!file) return tl::unexpected(file.error());
  if (file->manifest != key.text()) return tl::unexpected(flaw("an entry belongs to another key"));
  return std::move(file->entry);
}

std::optional<Fault> Pack::misfit(const KeyManifest& key) const {
  const auto fields = key_fields(key.text()).value_or(std::vector<KeyField>{});
  for (const std::string_view name : kLabelFields) {
    const auto asked =
        std::find_if(fields.begin(), fields.end(), [&](const KeyField& f) { return f.name == name; });
    if (asked == fields.end()) continue;
    std::string offered;
    bool fits = false;
    for (const auto& [label, value] : info_.labels)
      if (label == name) {
        fits |= value == asked->value;
        offered += fmt::format("{}'{}'", offered.empty() ? "" : ", ", value);
      }
    if (fits || offered.empty()) continue;
    if (name == kLabelFields.front()) return std::nullopt;
    return Fault{
        fmt::format("misfit {}", info_.file.native()),
        fmt::format("the pack '{}' was made for {} {}, here it is '{}': nothing of it is used; make one "
                    "for this machine with `kda-jit precompile --pack`",
                    info_.file.native(), name, offered, asked->value)};
  }
  return std::nullopt;
}

tl::expected<PackInfo, Fault> write_pack(const std::filesystem::path& file, std::vector<EntryFile> entries) {
  std::sort(entries.begin(), entries.end(), [](const EntryFile& a, const EntryFile& b) {
    return hex_digest(a.manifest) < hex_digest(b.manifest);
  });
  PackInfo info{file, entries.size(), 0, {}, labels_of(entries)};
  Blobs blobs;
  std::string items;
  for (const EntryFile& entry : entries)
    items += encode_entry(entry, blobs);
  std::string index(kMagic);
  put_integer(index, kPackVersion, 4);
  put_integer(index, 0, 8); // the sizes of the file and of the index, known at the end
  put_integer(index, 0, 8);
  put_integer(index, info.labels.size(), 4);
  for (const auto& [name, value] : info.labels) {
    put_string(index, name);
    put_string(index, value);
  }
  put_integer(index, blobs.all().size(), 4);
  for (const std::string* blob : blobs.all()) {
    put_integer(index, blob->size(), 8);
    index += checksum(*blob);
    info.bytes += blob->size();
  }
  put_integer(index, entries.size(), 4);
  index += items;
  const std::size_t index_bytes = index.size() + kChecksumBytes;
  info.bytes += index_bytes;
  std::string sizes;
  put_integer(sizes, info.bytes, 8);
  put_integer(sizes, index_bytes, 8);
  index.replace(kSizeOffset, sizes.size(), sizes);
  const std::string digest = checksum(index);
  info.digest = hex(digest);
  auto out = AtomicFile::create(file);
  if (!out) return tl::unexpected(out.error());
  if (auto written = out->write(index + digest); !written) return tl::unexpected(written.error());
  for (const std::string* blob : blobs.all())
    if (auto written = out->write(*blob); !written) return tl::unexpected(written.error());
  if (auto done = out->commit(); !done) return tl::unexpected(done.error());
  return info;
}

} // namespace kda::cache
