#pragma once
// What a call takes at least, whatever the variant: the axes of a report's roofline.
#include "codegen/problem.h"

namespace kda {

/// Every input read once, every output written once.
[[nodiscard]] double compulsory_bytes(const Problem&, const Sizes&);
/// Additions and multiplications of the recurrence, token by token, in terms of K V a token and value head;
/// the terms of one of them (gates, norms, beta) are left out, so 0 for the gate's operations. Chunks do
/// more.
[[nodiscard]] double recurrence_flop(const Problem&, const Sizes&);

} // namespace kda
