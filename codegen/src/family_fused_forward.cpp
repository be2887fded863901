// Sizes and launch of fused_forward.cu. The constants of fused_forward/ring.cuh stand here a second time.
#include "family.h"
#include <algorithm>
#include <cmath>
#include <fmt/format.h>

namespace kda {
namespace {

constexpr int kChunk = 16, kThreads = 512, kAttempts = 9;
constexpr int kDim = 128; // K and V

int shared_bytes(const Variant& v) {
  const int tile = kChunk * kDim * 2;
  const int slot = 5 * tile; // q, k, v, g, and the keys that meet the state
  return v.stages * (slot + kDim * 4 + kChunk * 4 + 3 * 8) + kDim * 4 +
         v.prepare_warps * kChunk * (kChunk + 4) * 4 + v.scan_warps * 512 + 8 * kAttempts;
}

std::string reject(const Problem& p, const Target& t, const Variant& v) {
  if (t.arch != "sm_90a") return fmt::format("needs wgmma, which sm_90a has and {} has not", t.arch);
  if (p.key_dim != kDim || p.value_dim != kDim)
    return fmt::format("is for K = V = 128, not K={} V={}", p.key_dim, p.value_dim);
  if (p.dtype != DType::bf16 || p.gate_dtype != DType::bf16)
    return fmt::format("is for q, k, v, g in bf16, not {} and {}", to_string(p.dtype),
                       to_string(p.gate_dtype));
  if (const int need = shared_bytes(v); need > t.max_shared_bytes)
    return fmt::format("needs {} bytes of shared memory, {} allows {}", need, t.arch, t.max_shared_bytes);
  return {};
}

std::vector<std::string> kernel_entries(const Problem&) {
  return {"kda_forward_fused"};
}

void variants(const Problem& p, const Target& t, std::vector<Candidate>& all) {
  for (const int stages : {10}) {
    Variant v;
    v.algorithm = Algorithm::fused;
    v.chunk = kChunk;
    v.value_tile = kDim;
    v.prepare_warps = 7;
    v.scan_warps = 8;
    v.stages = stages;
    all.push_back({v, reject(p, t, v)});
  }
}

/// A CTA a sequence and value head; packed, one more sequence zeros what lies behind the last.
LaunchList launch_list(const Problem& p, const Variant& v, const Target&, const Sizes& s) {
  LaunchList list;
  list.add(0, (s.sequences + (p.varlen ? 1 : 0)) * p.value_heads, kThreads, shared_bytes(v));
  return list;
}

WorkspaceLayout buffers(const Problem&, const Variant&, const Sizes&) {
  return {};
}

// Fitted to an H100 80GB HBM3 (T = 512 to 8192, N HV = 8 to 1024): 4 % off at most. The CTAs of a wave run
// side by side, so heads cost nothing until the SMs are used up.
constexpr double kStepUs = 1.01;    // a chunk, gate bounded by -5
constexpr double kWideStepUs = 1.2; // a chunk of any other gate
constexpr double kWaveUs = 14;      // states in and out, and the first chunks on their way

double estimate(const Problem& p, const Variant&, const Target& t, const Sizes& s) {
  const double chunks = std::ceil(static_cast<double>(s.batch * s.tokens) /
                                  std::max(1.0, static_cast<double>(s.sequences)) / kChunk);
  const double waves = std::ceil(static_cast<double>(s.sequences) * p.value_heads / t.multiprocessors);
  const bool bounded = p.gate == GateKind::bounded || p.gate == GateKind::bounded_no_a;
  return waves * (chunks * (bounded ? kStepUs : kWideStepUs) + kWaveUs);
}

} // namespace

const Family kFusedForwardFamily{"fused_forward.cu", kernel_entries, variants,
                                 launch_list,        buffers,        estimate};

} // namespace kda
