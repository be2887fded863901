// Sizes and launches of recurrent_backward.cu.
#include "family.h"
#include <algorithm>
#include <cmath>
#include <fmt/format.h>

namespace kda {
namespace {

/// CTAs of the scan at a time: each has its own scratch, so their number bounds the workspace.
constexpr std::int64_t kMostScanCtas = 512;

/// RowSpread of stages/token_load.cuh: how K lies across the lanes of a warp.
struct Spread {
  int lanes, elements, rows;
};
Spread spread_of(const Problem& p) {
  const int groups = p.key_dim / 4;
  const int lanes = groups > 16 ? 32 : (groups > 8 ? 16 : (groups > 4 ? 8 : 4));
  return {lanes, 4 * ((groups + lanes - 1) / lanes), 32 / lanes};
}

int tile_rows(const Variant& v) {
  return v.rows * v.scan_warps;
}
int value_tiles(const Problem& p, const Variant& v) {
  return (p.value_dim + tile_rows(v) - 1) / tile_rows(v);
}
/// Floats of a tile of a state in the workspace.
std::size_t dense(const Problem& p, const Variant& v) {
  const Spread s = spread_of(p);
  return static_cast<std::size_t>(v.rows / s.rows) * static_cast<std::size_t>(s.elements * v.scan_warps) *
         32U;
}
int sums(const Problem& p) {
  return 3 * p.key_dim + 4;
}
int scan_shared(const Problem& p, const Variant& v) {
  return 4 * (v.chunk * tile_rows(v) + 2 * v.scan_warps * sums(p));
}

std::vector<std::string> kernel_entries(const Problem&, const Variant&) {
  return {"kda_backward_scan", "kda_backward_finish", "kda_backward_gate", "kda_backward_reduce"};
}

std::string reject(const Problem& p, const Target& t, const Variant& v) {
  const Spread s = spread_of(p);
  if (v.rows < s.rows)
    return fmt::format("{} rows of V are fewer than the {} a warp works on at K={}", v.rows, s.rows,
                       p.key_dim);
  constexpr int kMostStateRegisters = 32; // a thread's part of S, and as many of its gradient; 64 spill
  if (const int need = v.rows / s.rows * s.elements; need > kMostStateRegisters)
    return fmt::format("a lane would hold {} values of the state, {} fit", need, kMostStateRegisters);
  if (tile_rows(v) >= 2 * std::max(p.value_dim, s.rows * v.scan_warps))
    return fmt::format("a tile of {} rows is twice V={} or more", tile_rows(v), p.value_dim);
  if (const int need = scan_shared(p, v); need > t.max_shared_bytes)
    return fmt::format("needs {} bytes of shared memory, {} allows {}", need, t.arch, t.max_shared_bytes);
  return {};
}

void variants(const Problem& p, const Target& t, std::vector<Candidate>& all) {
  for (const int chunk : {16, 32})
    for (const int rows : {4, 8, 16})
      for (const int warps : {4, 8}) {
        Variant v;
        v.algorithm = Algorithm::token;
        v.chunk = chunk;
        v.rows = rows;
        v.scan_warps = warps;
        all.push_back({v, reject(p, t, v)});
      }
}

std::int64_t scan_ctas(const Problem& p, const Variant& v, const Sizes& s) {
  return std::min(s.sequences * p.value_heads * value_tiles(p, v), kMostScanCtas);
}
/// Tiles of tokens of the gate's backward (stages/gate_tile.cuh).
std::int64_t gate_tiles(const Variant& v, const Sizes& s) {
  return s.batch * ((s.tokens + tile_rows(v) - 1) / tile_rows(v));
}
bool has_parameters(const Problem& p) {
  return p.dt_bias || reads_a_log(p.gate);
}

LaunchList launch_list(const Problem& p, const Variant& v, const Target&, const Sizes& s) {
  LaunchList list;
  const int threads = v.scan_warps * 32;
  const std::int64_t items = s.batch * s.tokens * p.heads,
                     cta_items = static_cast<std::int64_t>(v.scan_warps) * spread_of(p).rows;
  const int gate_shared = has_parameters(p) ? v.scan_warps * (p.key_dim + 1) * 4 : 0;
  list.add(0, scan_ctas(p, v, s), threads, scan_shared(p, v));
  list.add(1, (items + cta_items - 1) / cta_items, threads, 0);
  list.add(2, gate_tiles(v, s) * p.value_heads, threads, gate_shared);
  if (has_parameters(p)) list.add(3, p.value_heads, threads, gate_shared);
  return list;
}

/// The slots that recurrent_backward.cu lists.
WorkspaceLayout buffers(const Problem& p, const Variant& v, const Sizes& s) {
  constexpr std::size_t kFloat = sizeof(float);
  const auto heads = static_cast<std::size_t>(p.value_heads),
             tiles = static_cast<std::size_t>(value_tiles(p, v));
  const auto rows = static_cast<std::size_t>(s.batch * s.tokens), keys = static_cast<std::size_t>(p.key_dim);
  const auto partials = static_cast<std::size_t>(gate_tiles(v, s)) * heads * kFloat;
  WorkspaceLayout layout;
  layout.add(p.dt_bias ? partials * keys : 0);
  layout.add(reads_a_log(p.gate) ? partials : 0);
  layout.add(static_cast<std::size_t>(chunk_bound(p, s, v.chunk)) * heads * tiles * dense(p, v) * kFloat);
  layout.add(static_cast<std::size_t>(scan_ctas(p, v, s)) * static_cast<std::size_t>(v.chunk) * dense(p, v) *
             kFloat);
  layout.add(tiles * rows * heads * static_cast<std::size_t>(sums(p)) * kFloat);
  layout.add(rows * heads * keys * kFloat);
  return layout;
}

/// First guesses for an H100: a token costs a chain of about 1.5 us over the three walks, S' moves through
/// L2.
double estimate(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  constexpr double kChainUs = 1.5, kL2BytesPerUs = 4.0e6, kLaunchUs = 3.0;
  const double units = static_cast<double>(s.sequences) * p.value_heads * value_tiles(p, v);
  const double length =
      static_cast<double>(s.batch * s.tokens) / static_cast<double>(std::max<std::int64_t>(s.sequences, 1));
  const double waves = std::ceil(units / (t.multiprocessors * (v.scan_warps == 4 ? 4.0 : 2.0)));
  const double bytes = units * length * 8.0 * static_cast<double>(dense(p, v));
  return 4 * kLaunchUs +
         std::max(waves * length * (kChainUs + 0.02 * v.rows * spread_of(p).elements), bytes / kL2BytesPerUs);
}

} // namespace

const Family kTokenBackwardFamily{
    "recurrent_backward.cu", kernel_entries, variants, launch_list, buffers, estimate};

} // namespace kda
