// Sizes and launches of gate.cu.
#include "family.h"
#include <algorithm>
#include <cmath>

namespace kda {
namespace {

bool has_parameters(const Problem& p) {
  return reads_a_log(p.gate) || p.dt_bias;
}

std::vector<std::string> kernel_entries(const Problem& p, const Variant&) {
  if (p.operation == Operation::gate) return {"kda_gate_forward"};
  if (!has_parameters(p)) return {"kda_gate_backward"};
  return {"kda_gate_backward", "kda_gate_reduce"};
}

void variants(const Problem&, const Target&, std::vector<Candidate>& all) {
  for (const int rows : {32, 8}) // tokens of a warp
    for (const int warps : {4, 8}) {
      Variant v;
      v.algorithm = Algorithm::gate;
      v.rows = rows;
      v.scan_warps = warps;
      all.push_back({v, {}});
    }
}

std::int64_t tiles(const Variant& v, const Sizes& s) {
  const std::int64_t tokens = static_cast<std::int64_t>(v.rows) * v.scan_warps;
  return s.batch * ((s.tokens + tokens - 1) / tokens);
}

LaunchList launch_list(const Problem& p, const Variant& v, const Target&, const Sizes& s) {
  LaunchList list;
  const int threads = v.scan_warps * 32;
  const bool sums = p.operation == Operation::gate_backward && has_parameters(p);
  // Sums over the warps of a CTA: [warps][K + 1] floats.
  const int shared = sums ? v.scan_warps * (p.key_dim + 1) * 4 : 0;
  list.add(0, tiles(v, s) * p.value_heads, threads, shared);
  if (sums) list.add(1, p.value_heads, threads, shared);
  return list;
}

WorkspaceLayout buffers(const Problem& p, const Variant& v, const Sizes& s) {
  WorkspaceLayout layout;
  if (p.operation != Operation::gate_backward) return layout;
  const auto partials = static_cast<std::size_t>(tiles(v, s) * p.value_heads) * sizeof(float);
  layout.add(p.dt_bias ? partials * static_cast<std::size_t>(p.key_dim) : 0);
  layout.add(reads_a_log(p.gate) ? partials : 0);
  return layout;
}

double estimate(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  constexpr double kBytesPerUs = 3.0e6; // device copy on an H100
  constexpr double kLaunchUs = 3.0;
  constexpr double kTokenUs = 0.3; // one token of a warp, measured on an H100
  const double elements =
      static_cast<double>(s.batch) * static_cast<double>(s.tokens) * p.value_heads * p.key_dim;
  const bool backward = p.operation == Operation::gate_backward;
  const double bytes = elements * (size_of(p.gate_dtype) * (backward ? 2 : 1) + 4);
  const double ctas = static_cast<double>(tiles(v, s)) * p.value_heads;
  const double waves = std::ceil(ctas * v.scan_warps / (32.0 * t.multiprocessors));
  return kLaunchUs * (backward && has_parameters(p) ? 2 : 1) +
         std::max(bytes / kBytesPerUs, waves * v.rows * kTokenUs);
}

} // namespace

const Family kGateFamily{"gate.cu", kernel_entries, variants, launch_list, buffers, estimate};

} // namespace kda
