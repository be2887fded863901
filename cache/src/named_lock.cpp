#include "cache/named_lock.h"
#include "cache/key.h"
#include "file_lock.h"
#include <fmt/format.h>

namespace kda::cache {

std::shared_ptr<const void> lock_named(const std::filesystem::path& directory, std::string_view name,
                                       double wait_seconds, const std::function<void()>& waiting,
                                       const std::function<void(const std::string&)>& warn) {
  if (directory.empty()) return nullptr;
  KeyManifest key;
  key.add("lock", name); // any bytes become a file name
  const std::string digest = key.digest();
  const std::filesystem::path file = directory / fmt::format("device-{}.lock", digest);
  std::string why;
  for (const double wait : {0.0, wait_seconds}) {
    auto lock = FileLock::acquire(file, digest, wait);
    if (lock) return std::make_shared<const FileLock>(std::move(*lock));
    const bool held = lock.error().cause == FileLock::kTimedOut;
    why = held ? fmt::format("waited {:g} s for another user of {}; going on beside it", wait, name)
               : lock.error().sentence;
    if (!held) break;
    if (wait == 0 && waiting) waiting();
  }
  if (warn) warn(why);
  return nullptr;
}

} // namespace kda::cache
