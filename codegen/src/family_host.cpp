// Sizes and launches of the host's kernels. A launch's grid counts items; the pool spreads them.
#include "codegen/reference_unit.h"
#include "family.h"
#include "host/emit.h"
#include <algorithm>
#include <cmath>
#include <fmt/format.h>

namespace kda {
namespace {

bool is_recurrence(const Problem& p) {
  return p.operation == Operation::forward || p.operation == Operation::recurrent ||
         p.operation == Operation::replay;
}

std::int64_t items(const Problem& p, const Variant& v, const Sizes& s) {
  switch (p.operation) {
  case Operation::backward: return 1; // the float64 reference
  case Operation::gate:
    return s.batch * p.value_heads * ((s.tokens + host::kGateTokens - 1) / host::kGateTokens);
  case Operation::gate_backward: return p.value_heads;
  default: break;
  }
  const bool padding = p.varlen && p.operation != Operation::replay; // behind the last sequence
  const std::int64_t sequences = s.sequences + (padding ? 1 : 0);
  return sequences * p.value_heads * ((p.value_dim + v.rows - 1) / v.rows);
}

} // namespace

void enumerate_host(const Problem& p, const Target&, std::vector<Candidate>& all) {
  Variant v;
  if (!is_recurrence(p)) { // no tunables
    v.algorithm = p.operation == Operation::backward ? Algorithm::token : Algorithm::gate;
    all.push_back({v, {}});
    return;
  }
  // Slices of V: fewer columns give more threads something to do, and repeat the work on q, k and gate.
  v.rows = padded(p.value_dim);
  all.push_back({v, {}});
  for (const int columns : {128, 64, 32, 16})
    if (columns < padded(p.value_dim)) {
      v.rows = columns;
      all.push_back({v, {}});
    }
}

Result<SourceUnit> emit_host(const Problem& p, const Variant& v, const Target& t) {
  if (p.operation == Operation::backward) return reference_unit(p);
  if (!is_recurrence(p)) return host::emit_gate(p, t);
  if (v.algorithm != Algorithm::token || v.rows <= 0 || v.rows % 16 != 0)
    return fail(
        ErrorCode::invalid_argument,
        fmt::format("the host cannot run the variant '{}'; one reads like 'token r=64'", to_string(v)));
  return host::emit_recurrent(p, v, t);
}

LaunchList launches_host(const Problem& p, const Variant& v, const Sizes& s) {
  LaunchList list;
  list.add(0, items(p, v, s), 0, 0);
  return list;
}

double estimate_host_us(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  // Fitted on a Zen 5 core with 64-byte vectors, K = V = 128, fp32 state.
  const bool v_k = p.state_layout == StateLayout::v_k;
  constexpr double kCyclesPerUs = 3000;
  constexpr double kChannelCycles = 2;           // of a token's q, k, gate and norm, whatever the slice
  const double kVectorCycles = v_k ? 3.2 : 1.8;  // two updates, two sums; [K,V]: load and store
  const double kElementCycles = v_k ? 0.0 : 0.5; // of the state, into scratch and out
  if (!is_recurrence(p)) return 0;               // nothing to choose from
  const double vectors = static_cast<double>(v.rows) / std::max(t.vector_bytes / 4, 1);
  const double token = p.key_dim * (kChannelCycles + kVectorCycles * vectors);
  const double sequences = std::max(1.0, static_cast<double>(s.sequences));
  const double length = static_cast<double>(s.batch) * static_cast<double>(s.tokens) / sequences;
  const double item = length * token + kElementCycles * p.key_dim * v.rows;
  const double waves = std::ceil(static_cast<double>(items(p, v, s)) / std::max(t.multiprocessors, 1));
  return waves * item / kCyclesPerUs;
}

} // namespace kda
