#pragma once
// What the host has no kernel for yet (backward) runs as the float64 reference. Such a
// source unit has no text: its options hold the problem, and its one entry is named "float64 reference".
#include "codegen/source_unit.h"
#include <optional>

namespace kda {

[[nodiscard]] SourceUnit reference_unit(const Problem&);
/// The problem of such a unit; empty for a unit that has text to compile.
[[nodiscard]] std::optional<Problem> reference_problem(const SourceUnit&);

} // namespace kda
