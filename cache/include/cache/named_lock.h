#pragma once
// A lock among threads and processes that lasts as long as its holder wants: one tuner on a device at a time.
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace kda::cache {

/// Takes the lock `name` of `directory` and holds it as long as the result lives; the system frees it when
/// the holder dies, however it dies. `waiting` is called once when another holds it. Null when locks do not
/// work there, when the directory is empty, or after `wait_seconds`; `warn` hears why (not of the empty one).
[[nodiscard]] std::shared_ptr<const void> lock_named(const std::filesystem::path& directory,
                                                     std::string_view name, double wait_seconds,
                                                     const std::function<void()>& waiting,
                                                     const std::function<void(const std::string&)>& warn);

} // namespace kda::cache
