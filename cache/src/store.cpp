#include "cache/store.h"
#include "eviction.h"
#include "file_lock.h"
#include "folder.h"
#include "hash.h"
#include "memory_layer.h"
#include "pack.h"
#include <chrono>
#include <condition_variable>
#include <fmt/format.h>
#include <mutex>
#include <unordered_set>

namespace kda::cache {
namespace fs = std::filesystem;
namespace {

bool of_arch(std::string_view manifest, const std::set<std::string>& wanted) {
  if (wanted.empty()) return true;
  for (const KeyField& field : key_fields(manifest).value_or(std::vector<KeyField>{}))
    if (field.name == "arch") return wanted.contains(std::string(field.value));
  return false;
}

} // namespace

struct Store::Impl {
  StoreOptions options;
  std::optional<Folder> user;
  std::vector<Folder> read_only;
  std::vector<Pack> packs;
  std::vector<std::string> unread; // sentences about packs that could not be opened

  std::mutex mutex; // guards everything below; never held during disk work or a make
  std::condition_variable idle;
  MemoryLayer memory;
  std::unordered_set<std::string> busy;    // manifests that a thread is making
  std::unordered_set<std::string> refused; // manifests whose files a loader refused: not read again
  std::unordered_set<std::string> warned;  // causes
  StoreStats counts;
  std::uint64_t unchecked = 0; // bytes published since the size limit was last looked at
  bool checked = false;        // ever, by this store

  bool warn(const Fault& fault); ///< whether it is the first of its cause
  std::shared_ptr<const Entry> from_memory(const KeyManifest& key, Source* source);
  std::shared_ptr<const Entry> from_disk(const KeyManifest& key, Source* source);
  std::shared_ptr<const Entry> find(const KeyManifest& key, Source* source);
  std::optional<FileLock> lock(const KeyManifest& key);
  std::shared_ptr<const Entry> keep(const KeyManifest& key, Entry entry);
  void hold_limit(std::uint64_t published);

  /// While it lives, its thread is the only one of this process that makes the key.
  class Turn {
  public:
    Turn(Impl& impl, const std::string& manifest) : impl_(impl), manifest_(manifest) {
      std::unique_lock lock(impl_.mutex);
      impl_.idle.wait(lock, [&] { return impl_.busy.insert(manifest_).second; });
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() {
      {
        const std::lock_guard lock(impl_.mutex);
        impl_.busy.erase(manifest_);
      }
      impl_.idle.notify_all();
    }

  private:
    Impl& impl_;
    const std::string& manifest_;
  };
};

bool Store::Impl::warn(const Fault& fault) {
  {
    const std::lock_guard lock(mutex);
    if (!warned.insert(fault.cause).second) return false;
  }
  if (options.warn) options.warn(fault.sentence);
  return true;
}

std::shared_ptr<const Entry> Store::Impl::from_memory(const KeyManifest& key, Source* source) {
  const std::lock_guard lock(mutex);
  auto found = memory.find(key.text());
  if (!found) return nullptr;
  ++counts.memory_hits;
  if (source) *source = Source::memory;
  return found;
}

std::shared_ptr<const Entry> Store::Impl::from_disk(const KeyManifest& key, Source* source) {
  {
    const std::lock_guard lock(mutex);
    if (refused.contains(key.text())) return nullptr;
  }
  const auto look = [&](const auto& layer, Source where, std::int64_t& hits) -> std::shared_ptr<const Entry> {
    auto loaded = layer.load(key);
    const bool corrupt = !loaded && warn(loaded.error());
    const std::lock_guard lock(mutex);
    counts.corrupt += corrupt ? 1 : 0;
    if (!loaded || !*loaded) return nullptr;
    ++hits;
    if (source) *source = where;
    if (auto before = memory.find(key.text())) return before; // of another thread
    auto entry = std::make_shared<const Entry>(*std::move(*loaded));
    memory.put(key.text(), entry);
    return entry;
  };
  if (user)
    if (auto entry = look(*user, Source::disk, counts.disk_hits)) {
      mark_used(user->entry_file(key.digest()));
      return entry;
    }
  for (const Folder& folder : read_only)
    if (auto entry = look(folder, Source::read_only, counts.read_only_hits)) return entry;
  for (const Pack& pack : packs) {
    if (auto entry = look(pack, Source::pack, counts.pack_hits)) return entry;
    if (const auto misfit = pack.misfit(key)) warn(*misfit);
  }
  return nullptr;
}

std::shared_ptr<const Entry> Store::Impl::find(const KeyManifest& key, Source* source) {
  auto entry = from_memory(key, source);
  return entry ? entry : from_disk(key, source);
}

std::optional<FileLock> Store::Impl::lock(const KeyManifest& key) {
  if (!user) return std::nullopt;
  // Again, not only in the constructor: the directory may have been removed since.
  if (auto made = user->create(); !made) {
    warn(made.error());
    return std::nullopt;
  }
  auto lock = FileLock::acquire(user->lock_file(), key.digest(), options.lock_wait_seconds);
  if (!lock) {
    warn(lock.error());
    return std::nullopt;
  }
  return std::move(*lock);
}

std::shared_ptr<const Entry> Store::Impl::keep(const KeyManifest& key, Entry entry) {
  auto kept = std::make_shared<const Entry>(std::move(entry));
  {
    const std::lock_guard lock(mutex);
    memory.put(key.text(), kept);
  }
  if (!user) return kept;
  if (auto published = user->publish(key, *kept); !published) {
    warn(published.error());
    return kept;
  }
  {
    const std::lock_guard lock(mutex);
    refused.erase(key.text());
  }
  hold_limit(kept->payload.size());
  return kept;
}

/// The listing of a folder costs some milliseconds: once a store, then once a sixteenth of the limit.
void Store::Impl::hold_limit(std::uint64_t published) {
  {
    const std::lock_guard lock(mutex);
    unchecked += published;
    if (checked && (options.max_bytes == 0 || unchecked < options.max_bytes / 16)) return;
    checked = true;
    unchecked = 0;
  }
  evict(*user, options.max_bytes);
}

Store::Store(StoreOptions options) : impl_(std::make_unique<Impl>()) {
  impl_->options = std::move(options);
  impl_->memory = MemoryLayer(impl_->options.max_memory_bytes);
  for (const fs::path& directory : impl_->options.read_only)
    impl_->read_only.emplace_back(directory);
  for (const fs::path& file : impl_->options.packs) {
    auto pack = Pack::open(file);
    if (pack) {
      impl_->packs.push_back(*std::move(pack));
      continue;
    }
    impl_->unread.push_back(pack.error().sentence);
    impl_->warn(pack.error());
  }
  if (impl_->options.directory.empty()) return;
  impl_->user.emplace(impl_->options.directory);
  if (auto made = impl_->user->create(); !made) impl_->warn(made.error());
}

Store::~Store() = default;

std::shared_ptr<const Entry> Store::get(const KeyManifest& key, Source* source) {
  auto entry = impl_->find(key, source);
  if (!entry) {
    const std::lock_guard lock(impl_->mutex);
    ++impl_->counts.misses;
  }
  return entry;
}

std::shared_ptr<const Entry> Store::get_or_make(const KeyManifest& key,
                                                const std::function<std::optional<Entry>()>& make,
                                                Source* source) {
  if (auto entry = impl_->from_memory(key, source)) return entry;
  const Impl::Turn turn(*impl_, key.text());
  if (auto entry = impl_->find(key, source)) return entry;
  const std::optional<FileLock> lock = impl_->lock(key);
  // The lock may have come from a process that published meanwhile.
  if (lock)
    if (auto entry = impl_->from_disk(key, source)) return entry;
  {
    const std::lock_guard guard(impl_->mutex);
    ++impl_->counts.misses;
  }
  std::optional<Entry> made = make();
  if (!made) return nullptr;
  if (source) *source = Source::made;
  return impl_->keep(key, *std::move(made));
}

void Store::discard(const KeyManifest& key, const std::string& why) {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->memory.erase(key.text());
    impl_->refused.insert(key.text());
    ++impl_->counts.corrupt;
  }
  const std::string digest = key.digest();
  impl_->warn({digest, fmt::format("discarding the cache entry {}: {}; it will be made anew", digest, why)});
  if (impl_->user) {
    std::error_code error; // if it stays, the next entry replaces it
    fs::remove(impl_->user->entry_file(digest), error);
  }
}

StoreStats Store::stats() const {
  StoreStats stats;
  {
    const std::lock_guard lock(impl_->mutex);
    stats = impl_->counts;
  }
  if (!impl_->user) return stats;
  for (const fs::path& path : impl_->user->list().entries) {
    std::error_code error;
    const auto bytes = fs::file_size(path, error);
    if (error) continue; // removed meanwhile
    ++stats.entries;
    stats.bytes += static_cast<std::int64_t>(bytes);
  }
  return stats;
}

VerifyReport Store::verify(bool remove_bad) {
  VerifyReport report;
  const auto bad = [&](const fs::path& path, const std::string& why) {
    report.bad.push_back(fmt::format("{}: {}", path.native(), why));
    std::error_code error;
    if (remove_bad && !fs::remove(path, error))
      report.bad.back() += fmt::format(" (cannot remove it: {})", error.message());
  };
  report.bad = impl_->unread;
  for (const Pack& pack : impl_->packs)
    for (std::size_t i = 0; i < pack.info().entries; ++i) {
      if (const auto file = pack.read(i))
        ++report.good;
      else
        report.bad.push_back(file.error().sentence);
    }
  if (!impl_->user) return report;
  const auto listing = impl_->user->list();
  for (const fs::path& path : listing.entries) {
    const auto file = Folder::examine(path);
    if (!file)
      bad(path, file.error());
    else
      report.good += *file ? 1 : 0; // or removed meanwhile
  }
  for (const fs::path& path : listing.temporaries) {
    std::error_code error;
    const auto written = fs::last_write_time(path, error);
    // A younger one may be a write in progress.
    if (!error && fs::file_time_type::clock::now() - written > kInterrupted)
      bad(path, "left behind by a write that was interrupted");
  }
  return report;
}

PruneReport Store::prune(std::uint64_t max_bytes) {
  return impl_->user ? evict(*impl_->user, max_bytes) : PruneReport{};
}

std::int64_t Store::clear() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->memory.clear();
    impl_->refused.clear();
  }
  std::int64_t removed = 0;
  if (!impl_->user) return removed;
  const auto listing = impl_->user->list();
  std::error_code error;
  for (const fs::path& path : listing.entries)
    removed += fs::remove(path, error) ? 1 : 0;
  for (const fs::path& path : listing.temporaries)
    fs::remove(path, error); // a writer that loses its temporary keeps its entry in memory
  return removed;
}

tl::expected<PackInfo, std::string> Store::pack(const fs::path& file, const PackRequest& request) {
  std::vector<EntryFile> all;
  std::set<std::string> seen;
  const auto wanted = [&](const std::string& digest) {
    return (request.digests.empty() || request.digests.contains(digest)) && !seen.contains(digest);
  };
  const auto take = [&](EntryFile entry) {
    const std::string digest = hex_digest(entry.manifest);
    if (!wanted(digest) || !of_arch(entry.manifest, request.arch)) return;
    seen.insert(digest);
    all.push_back(std::move(entry));
  };
  std::list<MemoryLayer::Kept> memory;
  {
    const std::lock_guard lock(impl_->mutex);
    memory = impl_->memory.all();
  }
  for (const auto& kept : memory)
    if (wanted(hex_digest(kept.manifest))) take({kept.manifest, *kept.entry});
  std::vector<const Folder*> folders;
  if (impl_->user) folders.push_back(&*impl_->user);
  for (const Folder& folder : impl_->read_only)
    folders.push_back(&folder);
  for (const Folder* folder : folders)
    for (const fs::path& path : folder->list().entries) {
      if (!wanted(path.stem().native())) continue;
      auto entry = Folder::examine(path);
      if (!entry)
        impl_->warn({path.native(), fmt::format("not packed: '{}': {}", path.native(), entry.error())});
      else if (*entry)
        take(**std::move(entry));
    }
  for (const Pack& pack : impl_->packs)
    for (std::size_t i = 0; i < pack.info().entries; ++i) {
      auto entry = pack.read(i);
      if (entry)
        take(*std::move(entry));
      else
        impl_->warn(entry.error());
    }
  if (all.empty()) return tl::unexpected<std::string>("the cache holds no entry that the pack should have");
  if (all.size() < request.digests.size())
    return tl::unexpected(fmt::format("the cache holds only {} of the {} entries that the pack should have",
                                      all.size(), request.digests.size()));
  auto info = write_pack(file, std::move(all));
  if (!info) return tl::unexpected(info.error().sentence);
  return *std::move(info);
}

tl::expected<UnpackReport, std::string> Store::unpack(const fs::path& file) {
  if (!impl_->user) return tl::unexpected<std::string>("there is no cache directory to unpack to");
  const auto pack = Pack::open(file);
  if (!pack) return tl::unexpected(pack.error().sentence);
  std::vector<EntryFile> all;
  for (std::size_t i = 0; i < pack->info().entries; ++i) {
    auto entry = pack->read(i);
    if (!entry) return tl::unexpected(entry.error().sentence);
    all.push_back(*std::move(entry));
  }
  if (auto made = impl_->user->create(); !made) return tl::unexpected(made.error().sentence);
  UnpackReport report;
  for (const EntryFile& entry : all) {
    const KeyManifest key(entry.manifest);
    if (const auto present = impl_->user->load(key); present && *present) {
      ++report.present;
      continue;
    }
    if (auto done = impl_->user->publish(key, entry.entry); !done)
      return tl::unexpected(
          fmt::format("{}; {} entries were added before", done.error().sentence, report.added));
    ++report.added;
    impl_->hold_limit(entry.entry.payload.size());
  }
  return report;
}

std::vector<PackInfo> Store::packs() const {
  std::vector<PackInfo> all;
  for (const Pack& pack : impl_->packs)
    all.push_back(pack.info());
  return all;
}

fs::path Store::directory() const {
  return impl_->user ? impl_->user->path() : fs::path();
}

} // namespace kda::cache
