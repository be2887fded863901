// Sizes and launch of fused_forward.cu. The constants of fused_forward/ring.cuh stand here a second time.
#include "family.h"
#include <algorithm>
#include <cmath>
#include <fmt/format.h>

namespace kda {
namespace {

constexpr int kChunk = 16, kThreads = 512, kAttempts = 9;
constexpr int kDim = 128; // K and V
constexpr int kMergeThreads = 256, kMergeRows = 16;
constexpr int kLeastSegment = 4; // chunks

int shared_bytes(const Variant& v) {
  const int tile = kChunk * kDim * 2;
  const int slot = 5 * tile; // q, k, v, g, and the keys that meet the state
  return v.stages * (slot + kDim * 4 + kChunk * 4 + 3 * 8) + kDim * 4 +
         v.prepare_warps * kChunk * (kChunk + 4) * 4 + v.scan_warps * 512 + 8 * kAttempts + 80; // a Walk
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

std::vector<std::string> kernel_entries(const Problem&, const Variant& v) {
  if (v.segments > 1)
    return {"kda_forward_fused", "kda_forward_summary", "kda_forward_repair", "kda_forward_merge"};
  return {"kda_forward_fused"};
}

void variants(const Problem& p, const Target& t, std::vector<Candidate>& all) {
  for (const int segments : {0, 3, 4, 8, 16}) {
    Variant v;
    v.algorithm = Algorithm::fused;
    v.chunk = kChunk;
    v.value_tile = kDim;
    v.prepare_warps = 7;
    v.scan_warps = 8;
    v.stages = 10;
    v.segments = segments;
    std::string why = reject(p, t, v);
    // Four segments are faster there, too.
    if (why.empty() && segments == 3 && p.gate == GateKind::softplus) why = "spills with a softplus gate";
    all.push_back({v, std::move(why)});
  }
}

/// A CTA a sequence, value head and segment; packed, one more a value head zeros what lies behind the last
/// sequence.
LaunchList launch_list(const Problem& p, const Variant& v, const Target&, const Sizes& s) {
  LaunchList list;
  const std::int64_t units = s.sequences * p.value_heads, segments = std::max(v.segments, 1);
  if (segments > 1) list.add(1, units * (2 * segments - 3), kThreads, shared_bytes(v));
  if (segments > 2) list.add(3, units * (kDim / kMergeRows), kMergeThreads, kMergeRows * kDim * 4);
  list.add(0, units * segments + (p.varlen ? p.value_heads : 0), kThreads, shared_bytes(v));
  if (segments > 1) list.add(2, units, kThreads, shared_bytes(v));
  return list;
}

/// Slots 2 to 4, of stages/segments.cuh: starts, transitions, marks.
WorkspaceLayout buffers(const Problem& p, const Variant& v, const Sizes& s) {
  WorkspaceLayout layout;
  if (v.segments < 2) return layout;
  const auto units = static_cast<std::size_t>(s.sequences * p.value_heads);
  const auto segments = static_cast<std::size_t>(v.segments);
  layout.add(0);
  layout.add(0);
  layout.add(units * segments * kDim * kDim * 4);
  layout.add(units * (segments - 2) * kDim * kDim * 4);
  layout.add(units * (segments - 1) * 8);
  return layout;
}

// Fitted to an H100 80GB HBM3 (T = 512 to 8192, N HV = 8 to 1024): 4 % off at most. The CTAs of a wave run
// side by side, so heads cost nothing until the SMs are used up.
constexpr double kStepUs = 1.01;    // a chunk, gate bounded by -5
constexpr double kWideStepUs = 1.2; // a chunk of any other gate
constexpr double kWaveUs = 14;      // states in and out, and the first chunks on their way

// Segments whose boundaries are not forgetful, on that card (T = 2048 to 65536, N HV = 8 to 64): 7 % off at
// most where they win.
constexpr double kSummaryShare = 0.95; // of a chunk: q and o are a small part of it
constexpr double kSummaryWaveUs = 20;  // and the look at the gates, and a state of fp32 out
constexpr double kMergeUs = 2;         // a boundary: 64 KB of A, 1,024 FMA a thread
constexpr double kLaunchUs = 3;        // a kernel that finds nothing to do, or little
// Untuned, segments must win by more than that: their kernels take 2.5 s to compile there, those of the
// two-kernel form 0.9.
constexpr double kCompileMargin = 1.25;

/// Segments are estimated as if no boundary were forgetful: gates are not known here.
double estimate(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  const double chunks = std::ceil(static_cast<double>(s.batch * s.tokens) /
                                  std::max(1.0, static_cast<double>(s.sequences)) / kChunk);
  const double units = static_cast<double>(s.sequences) * p.value_heads;
  const bool bounded = p.gate == GateKind::bounded || p.gate == GateKind::bounded_no_a;
  const double step = bounded ? kStepUs : kWideStepUs;
  const auto pass = [&](double ctas, double chunk, double walked, double wave) {
    return std::ceil(ctas / t.multiprocessors) * (walked * chunk + wave);
  };
  if (v.segments < 2) return pass(units, step, chunks, kWaveUs);
  const double length = std::max(std::ceil(chunks / v.segments), static_cast<double>(kLeastSegment));
  const double used = std::max(1.0, std::ceil(chunks / length));
  const double summary =
      pass(units * std::max(2 * used - 3, 1.0), step * kSummaryShare, length, kSummaryWaveUs);
  const double merge = kMergeUs * std::max(used - 2, 0.0) + kLaunchUs * (v.segments > 2 ? 2 : 1);
  return kCompileMargin * (summary + merge + pass(units * used, step, length, kWaveUs));
}

} // namespace

const Family kFusedForwardFamily{"fused_forward.cu", kernel_entries, variants,
                                 launch_list,        buffers,        estimate};

} // namespace kda
