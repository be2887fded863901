#pragma once
// The files under templates/cuda, embedded at build time.
#include <optional>
#include <string_view>

namespace kda::templates {

/// The text of a template by its path below templates/cuda, e.g. "primitives/mma.cuh".
[[nodiscard]] std::optional<std::string_view> find(std::string_view name);

} // namespace kda::templates
