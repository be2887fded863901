#pragma once
// One emitter an algorithm; emit_host chooses.
#include "codegen/source_unit.h"

namespace kda::host {

/// forward and recurrent. An item is a slice of v.rows columns of one head of one sequence.
[[nodiscard]] SourceUnit emit_recurrent(const Problem&, const Variant&, const Target&);
/// The text of emit_recurrent for states [V,K].
[[nodiscard]] std::string rows_text(const Problem&, const Variant&, const Target&);
/// gate: an item is kGateTokens tokens of one head of one batch row. gate_backward: a head, so that its sums
/// have one order.
[[nodiscard]] SourceUnit emit_gate(const Problem&, const Target&);

constexpr int kGateTokens = 64;

} // namespace kda::host
