#include "folder.h"
#include "atomic_file.h"
#include "hash.h"
#include <cerrno>

namespace kda::cache {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kSuffix = ".kda";
constexpr std::string_view kTag = "Signature: 8a477f597d28d172789f06886806bc55\n"
                                  "# Compiled kernels of kda-jit; safe to delete.\n";

tl::expected<void, Fault> make_directories(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  // create_directories reports success on some libraries when a file has the name.
  if (!error && !fs::is_directory(path, error) && !error)
    error = std::make_error_code(std::errc::not_a_directory);
  if (error) return tl::unexpected(io_fault("cannot make the cache directory", path.native(), error.value()));
  return {};
}

tl::expected<void, Fault> write_file(const fs::path& path, std::string_view bytes) {
  auto file = AtomicFile::create(path);
  if (!file) return tl::unexpected(file.error());
  if (auto written = file->write(bytes); !written) return written;
  return file->commit();
}

Fault flaw(const fs::path& path, const std::string& why) {
  return {path.native(),
          fmt::format("ignoring the cache entry '{}': {}; it will be made anew", path.native(), why)};
}

} // namespace

Folder::Folder(const fs::path& directory) {
  std::error_code error;
  const fs::path absolute = fs::absolute(directory, error); // a later chdir must not move the cache
  path_ = (error ? directory : absolute) / fmt::format("v{}", kFormatVersion);
}

fs::path Folder::entry_file(const std::string& digest) const {
  return path_ / digest.substr(0, 1) / digest.substr(1, 1) / (digest + std::string(kSuffix));
}

tl::expected<void, Fault> Folder::create() const {
  if (auto made = make_directories(path_); !made) return made;
  const fs::path tag = path_.parent_path() / "CACHEDIR.TAG";
  std::error_code error;
  if (!fs::exists(tag, error))
    (void)write_file(tag, kTag); // a courtesy: if it cannot be written, the first entry says why
  return {};
}

tl::expected<std::optional<Entry>, Fault> Folder::load(const KeyManifest& key) const {
  const fs::path path = entry_file(key.digest());
  auto bytes = read_file(path);
  if (!bytes) return tl::unexpected(bytes.error());
  if (!*bytes) return std::nullopt;
  auto file = decode(**bytes);
  if (!file) return tl::unexpected(flaw(path, file.error()));
  if (file->manifest != key.text()) return tl::unexpected(flaw(path, "it belongs to another key"));
  return std::move(file->entry);
}

tl::expected<void, Fault> Folder::publish(const KeyManifest& key, const Entry& entry) const {
  const fs::path path = entry_file(key.digest());
  if (auto made = make_directories(path.parent_path()); !made) return made;
  return write_file(path, encode(key.text(), entry));
}

tl::expected<std::optional<EntryFile>, std::string> Folder::examine(const fs::path& file) {
  auto bytes = read_file(file);
  if (!bytes) return tl::unexpected(bytes.error().cause);
  if (!*bytes) return std::nullopt;
  auto decoded = decode(**bytes);
  if (!decoded) return tl::unexpected(decoded.error());
  if (hex_digest(decoded->manifest) + std::string(kSuffix) != file.filename().native())
    return tl::unexpected<std::string>("its name is not the digest of its key");
  return *std::move(decoded);
}

Folder::Listing Folder::list() const {
  Listing listing;
  std::error_code error;
  // A folder that vanishes during the walk ends it: what was seen so far is the answer.
  for (fs::recursive_directory_iterator it(path_, error), end; !error && it != end; it.increment(error)) {
    const fs::path& path = it->path();
    if (path.extension() == kSuffix)
      listing.entries.push_back(path);
    else if (path.extension() == AtomicFile::kTemporarySuffix)
      listing.temporaries.push_back(path);
  }
  return listing;
}

} // namespace kda::cache
