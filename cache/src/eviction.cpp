#include "eviction.h"
#include "file_lock.h"
#include "hash.h"
#include <algorithm>
#include <fcntl.h>
#include <sys/stat.h>

namespace kda::cache {
namespace fs = std::filesystem;
namespace {

using Clock = std::chrono::system_clock;

struct File {
  fs::path path;
  Clock::time_point used;
  std::uint64_t bytes;
};

std::optional<File> examine(const fs::path& path) {
  struct stat status = {};
  if (::lstat(path.c_str(), &status) != 0) return std::nullopt; // removed meanwhile
  const auto used = Clock::time_point(std::chrono::duration_cast<Clock::duration>(
      std::chrono::seconds(status.st_mtim.tv_sec) + std::chrono::nanoseconds(status.st_mtim.tv_nsec)));
  // Blocks, since a small file fills a whole one; some file systems count them late, so at least the size.
  const auto blocks = static_cast<std::uint64_t>(status.st_blocks) * 512;
  return File{path, used, std::max(blocks, static_cast<std::uint64_t>(status.st_size))};
}

/// What the file system's clock says, which the times of its files are by: a server's may differ from ours.
Clock::time_point now_of(const fs::path& file) {
  if (::utimensat(AT_FDCWD, file.c_str(), nullptr, 0) == 0)
    if (const auto touched = examine(file)) return touched->used;
  return Clock::now();
}

bool removed(const fs::path& path) {
  std::error_code error; // of another user: it stays
  return fs::remove(path, error);
}

} // namespace

void mark_used(const fs::path& entry) {
  const auto file = examine(entry);
  // In either direction: a time to come is of another clock, or of ours before it was set right.
  if (file && std::chrono::abs(Clock::now() - file->used) > kNoted)
    (void)::utimensat(AT_FDCWD, entry.c_str(), nullptr, 0);
}

PruneReport evict(const Folder& folder, std::uint64_t limit) {
  PruneReport report;
  const auto lock = FileLock::acquire(folder.lock_file(), hex_digest("eviction"), 0);
  // Without locks two may do it at once: each file is removed once all the same.
  if (!lock && lock.error().cause == FileLock::kTimedOut) return report;
  const Folder::Listing listing = folder.list();
  const auto now = now_of(folder.lock_file());
  for (const fs::path& path : listing.temporaries)
    if (const auto file = examine(path); file && now - file->used > kInterrupted && removed(path))
      ++report.interrupted;
  std::vector<File> files;
  for (const fs::path& path : listing.entries)
    if (auto file = examine(path)) {
      report.bytes += file->bytes;
      files.push_back(*std::move(file));
    }
  if (limit == 0 || report.bytes <= limit) return report;
  std::sort(files.begin(), files.end(), [](const File& a, const File& b) { return a.used < b.used; });
  for (const File& file : files) {
    if (report.bytes <= limit - limit / 16 || now - file.used < kInUse + kNoted) break;
    // Again: somebody may have used or written it since the listing, which takes a while for many.
    if (const auto today = examine(file.path); today && today->used != file.used) continue;
    if (!removed(file.path)) continue;
    ++report.removed;
    report.freed += file.bytes;
    report.bytes -= file.bytes;
  }
  return report;
}

} // namespace kda::cache
