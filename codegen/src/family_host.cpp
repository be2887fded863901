// Sizes and launches of the host's kernels. A launch's grid counts items; the pool spreads them.
#include "family.h"
#include <algorithm>
#include <cmath>

namespace kda {
namespace {

/// Whether there is a kernel; everything else runs as the float64 reference, one item, and has no tunables.
bool has_kernel(const Problem& p) {
  return p.operation == Operation::forward || p.operation == Operation::recurrent;
}

std::int64_t items(const Problem& p, const Variant& v, const Sizes& s) {
  const std::int64_t sequences = s.sequences + (p.varlen ? 1 : 0); // and the padding behind the last one
  return sequences * p.value_heads * ((p.value_dim + v.rows - 1) / v.rows);
}

} // namespace

void enumerate_host(const Problem& p, const Target&, std::vector<Candidate>& all) {
  Variant v;
  if (!has_kernel(p)) {
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

LaunchList launches_host(const Problem& p, const Variant& v, const Sizes& s) {
  LaunchList list;
  const std::int64_t count = has_kernel(p) ? items(p, v, s) : 1;
  if (count > 0) list.add({0, {static_cast<unsigned>(count), 1, 1}, 0, 0});
  return list;
}

double estimate_host_us(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  // Fitted on a Zen 5 core with 64-byte vectors, K = V = 128, fp32 state in [V,K].
  constexpr double kCyclesPerUs = 3000;
  constexpr double kChannelCycles = 2;  // of a token's q, k, gate and norm, whatever the slice
  constexpr double kVectorCycles = 1.9; // load, two updates, two sums, store
  constexpr double kElementCycles = 2;  // of the state, in and out
  if (!has_kernel(p)) return 0;         // nothing to choose from
  const double vectors = static_cast<double>(v.rows) / std::max(t.vector_bytes / 4, 1);
  const double token = p.key_dim * (kChannelCycles + kVectorCycles * vectors);
  const double sequences = std::max(1.0, static_cast<double>(s.sequences));
  const double length = static_cast<double>(s.batch) * static_cast<double>(s.tokens) / sequences;
  const double item = length * token + kElementCycles * p.key_dim * v.rows;
  const double waves = std::ceil(static_cast<double>(items(p, v, s)) / std::max(t.multiprocessors, 1));
  return waves * item / kCyclesPerUs;
}

} // namespace kda
