#pragma once
#include <filesystem>

namespace kda::cache {

/// Whether the directory lies on a file system shared between machines, as far as its type tells.
[[nodiscard]] bool on_network(const std::filesystem::path& directory);

} // namespace kda::cache
