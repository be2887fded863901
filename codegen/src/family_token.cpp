// Sizes and launches of recurrent.cu and replay.cu.
#include "family.h"
#include <algorithm>
#include <cmath>
#include <fmt/format.h>

namespace kda {
namespace {

/// How a warp holds its part of the state; RowSpread in stages/token_load.cuh is the same arithmetic.
struct Spread {
  int lanes;    ///< that share a row of K
  int channels; ///< of K that one lane holds
  int rows;     ///< of V that a warp works on at a time
};
constexpr int lanes_of(int key_dim) {
  int lanes = 4;
  while (lanes < key_dim / 4 && lanes < 32)
    lanes *= 2;
  return lanes;
}
constexpr Spread spread_of(const Problem& p, const Variant& v) {
  const int groups = p.key_dim / 4, lanes = v.lanes != 0 ? v.lanes : lanes_of(p.key_dim);
  return {lanes, 4 * ((groups + lanes - 1) / lanes), 32 / lanes};
}
/// Tiles of rows of one state, and CTAs of them.
constexpr int tiles_of(const Problem& p, const Variant& v) {
  return (p.value_dim + v.rows - 1) / v.rows;
}
constexpr int ctas_of(const Problem& p, const Variant& v) {
  return (tiles_of(p, v) + v.scan_warps - 1) / v.scan_warps;
}
/// Rows that a warp has at least: [K,V] is read in groups of four rows.
constexpr int least_rows(const Problem& p, const Spread& spread) {
  return spread.rows * (p.state_layout == StateLayout::k_v ? 4 : 1);
}
/// Bytes of a CTA's prepared tokens, SharedToken of recurrent.cu.
constexpr int shared_bytes(const Problem& p, const Variant& v) {
  return v.chunk * 4 * (3 * p.key_dim + (v.scan_warps * v.rows + 3) / 4 * 4 + 4);
}

/// Floats of the state that one lane keeps.
constexpr int state_floats(const Spread& spread, const Variant& v) {
  return v.rows / spread.rows * spread.channels;
}

/// Registers of a thread, fitted to ptxas 13.0 for sm_90a (within 25 of what it reports, mostly above). The
/// pipelined form also holds the next token prepared and `stages` tokens as loaded.
double registers(const Problem& p, const Spread& spread, const Variant& v) {
  const double words = spread.channels / 4.0 * (2 * size_of(p.dtype) + size_of(p.gate_dtype));
  const double pipeline = v.stages > 1 ? 3.0 * spread.channels + v.stages * words : 0;
  const double addresses = p.updates && v.stages > 1 ? 20 : 0; // of what is kept
  return 68 + 1.45 * state_floats(spread, v) + pipeline + addresses;
}

std::string reject(const Problem& p, const Target& t, const Variant& v) {
  const Spread spread = spread_of(p, v);
  const int least = least_rows(p, spread);
  if (v.rows < least)
    return fmt::format("a warp works on {} rows at a time at K={} in {}", least, p.key_dim,
                       to_string(p.state_layout));
  if (v.rows > std::max(padded(p.value_dim), least))
    return fmt::format("{} rows a warp are more than V={} has", v.rows, p.value_dim);
  if (v.lanes > lanes_of(p.key_dim))
    return fmt::format("{} lanes are more than K={} fills", v.lanes, p.key_dim);
  if (v.overlap != 0 && t.compute_capability < 90)
    return "programmatic dependent launch needs compute capability 9.0";
  if (v.chunk > 0 && tiles_of(p, v) % v.scan_warps != 0)
    return fmt::format("{} tiles of rows do not fill CTAs of {} warps, which wait for each other",
                       tiles_of(p, v), v.scan_warps);
  if (v.chunk > 0 && v.chunk < v.scan_warps)
    return fmt::format("{} tokens are too few for {} warps to prepare", v.chunk, v.scan_warps);
  if (v.chunk > 0 && p.tree) return "a tree reads the tokens on a path again: there is nothing to share";
  if (v.chunk > 0 && shared_bytes(p, v) > t.max_shared_bytes)
    return fmt::format("{} prepared tokens need {} bytes of shared memory", v.chunk, shared_bytes(p, v));
  if (p.tree && v.stages > 1) return "the tokens of a tree are not in order: nothing to load ahead";
  // 255 with a margin for what the fit misses, which is mostly above.
  const double most = v.lanes == 4 && v.rows == 32 ? 255 : 248;
  const double need = registers(p, spread, v);
  if (need > most) return fmt::format("needs about {:.0f} registers a thread of 255", need);
  if (need * 32 * v.scan_warps > t.registers_per_sm)
    return fmt::format("needs about {:.0f} registers for {} warps, more than an SM has", need, v.scan_warps);
  return {};
}

std::vector<std::string> kernel_entries(const Problem& p, const Variant&) {
  return {p.operation == Operation::replay ? "kda_replay" : "kda_recurrent"};
}

/// Every warp for itself; with the tokens prepared by a CTA together; with loads that run ahead. A ring of
/// bulk copies between memory and the registers was 4 to 7% slower than loads (H100, fp32 and bf16 states)
/// and is not here.
void variants(const Problem& p, const Target& t, std::vector<Candidate>& all) {
  const auto add = [&](int chunk, int warps, int rows, int stages, int lanes, int streaming, int overlap) {
    Variant v;
    v.algorithm = Algorithm::token;
    v.chunk = chunk;
    v.scan_warps = warps;
    v.rows = rows;
    v.stages = stages;
    v.lanes = lanes;
    v.streaming = streaming;
    v.overlap = overlap;
    all.push_back({v, reject(p, t, v)});
  };
  for (const int rows : {1, 2, 4, 8, 16, 32})
    for (const int warps : {1, 4}) {
      add(0, warps, rows, 1, 0, 0, 0);
      add(0, warps, rows, 1, 0, 0, 1);
      add(0, warps, rows, 1, 0, 1, 1);
    }
  if (p.operation == Operation::replay) return; // one load a token, nothing to prepare
  for (const int chunk : {4, 16})
    for (const int rows : {4, 8, 16})
      for (const int streaming : {0, 1}) {
        add(chunk, 4, rows, 1, 0, streaming, 1);
        // [K,V]: fewer lanes along K and more along V, whose elements are neighbours.
        if (p.state_layout == StateLayout::k_v)
          for (const int lanes : {8, 16})
            add(chunk, 4, rows, 1, lanes, streaming, 1);
      }
  // Whole lines of 128 bytes at fp32.
  if (p.state_layout == StateLayout::k_v)
    for (const int streaming : {0, 1})
      add(4, 4, 32, 1, 4, streaming, 1);
  for (const int rows : {1, 2, 4, 8, 16, 32})
    for (const int warps : {1, 4})
      add(0, warps, rows, 4, 0, 0, 0);
}

/// A CTA for the tiles of rows of each state that its warps own, and as many again for the padding behind
/// packed tokens.
LaunchList launch_list(const Problem& p, const Variant& v, const Target&, const Sizes& s) {
  const std::int64_t sequences = s.sequences + (p.varlen && p.operation != Operation::replay ? 1 : 0);
  LaunchList list;
  list.add(0, sequences * p.value_heads * ctas_of(p, v), v.scan_warps * 32, shared_bytes(p, v),
           v.overlap != 0);
  return list;
}

WorkspaceLayout buffers(const Problem&, const Variant&, const Sizes&) {
  return {};
}

/// What the pattern of the accesses costs, on an H100, over bytes in order. Streaming pays while states are
/// few.
double waste_v_k(const Problem& p, const Variant& v, double states) {
  const double hint = v.streaming == 0 ? 1 : states < 3000 ? 0.985 : 1.01;
  if (p.state_dtype != DType::fp32) return hint;
  // Many short warps are better than few long ones where they are too few to fill the SMs, and where they are
  // many.
  if (states < 64) return hint * (v.rows >= 8 ? 1.08 : 1);
  if (states <= 512) return hint;
  return hint * (v.rows < 8 ? 1 : v.rows >= 16 ? 1.03 : 1.012);
}
/// A warp reads runs along V, of a group of four elements a lane.
double waste_k_v(const Problem& p, const Spread& spread, const Variant& v, double states) {
  const int run = spread.rows * 4 * size_of(p.state_dtype);
  // While SMs have nothing else to do, a wasted sector costs nothing.
  const double short_runs = run >= 128 || (run >= 32 && states < 64) ? 1.02
                            : run >= 64                              ? 1.12
                            : run >= 32                              ? 1.26
                                                                     : 1.7;
  const double many_groups = run < 128 && v.rows > 4 * spread.rows ? 1.1 : 1;
  return short_runs * many_groups * (v.streaming == 0 ? 1 : states < 512 ? 0.97 : 1.04);
}

/// Bytes that must move: every token tensor once, and the states in and out.
double bytes_of(const Problem& p, const Spread& spread, const Variant& v, const Sizes& s) {
  const double tokens = static_cast<double>(s.batch) * static_cast<double>(s.tokens);
  const double per_token = 2.0 * p.heads * p.key_dim * size_of(p.dtype) +
                           p.value_heads * (2.0 * p.value_dim * size_of(p.dtype) +
                                            p.key_dim * size_of(p.gate_dtype) + size_of(p.beta_dtype));
  const double state = 2.0 * static_cast<double>(s.sequences) * p.value_heads * p.key_dim * p.value_dim *
                       size_of(p.state_dtype);
  const double states = static_cast<double>(s.sequences) * p.value_heads;
  return tokens * per_token + state * (p.state_layout == StateLayout::k_v ? waste_k_v(p, spread, v, states)
                                                                          : waste_v_k(p, v, states));
}

/// Fitted on an H100 to 18 shapes of 1 to 4,096 tokens: the choice costs 4% over the best variant in the
/// median and 22% at worst. Cycles are those of a warp.
double estimate(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  constexpr double kBytesPerUs = 3.0e6; // device copy
  constexpr double kCyclesPerUs = 1980;
  constexpr double kLoadCycles = 900;    // first loads to last store of a warp
  constexpr double kBarrierCycles = 450; // of a CTA, for what a warp prepares for the others
  constexpr double kTokenCycles = 1000;  // to load and prepare a token after a CTA's first ones
  const double launch_us = v.overlap != 0 ? 2 : 2.5;
  const bool pipelined = v.stages > 1;
  const Spread spread = spread_of(p, v);
  const double channel_cycles = p.gate == GateKind::softplus ? 90 : 50; // gate and norm
  const double shared = v.chunk > 0 ? 1.0 / v.scan_warps : 1.0;
  const double token_channels = v.chunk > 0 ? spread_of(p, {}).channels : spread.channels;
  const double issue = 120 + shared * channel_cycles * token_channels + 8.3 * state_floats(spread, v) +
                       (v.chunk > 0 ? 3.0 * spread.channels : 0);
  const double chain = issue + (pipelined ? 260 : v.chunk > 0 ? 300 : 500);
  const double setup = pipelined ? 850 : 100;

  const double sequences = std::max(1.0, static_cast<double>(s.sequences));
  const double length = static_cast<double>(s.batch) * static_cast<double>(s.tokens) / sequences;
  const double warps = sequences * p.value_heads * ctas_of(p, v) * v.scan_warps;
  const double resident = std::clamp(std::floor(2048 / registers(p, spread, v)), 1.0, 64.0);
  const double waves = std::ceil(warps / (resident * t.multiprocessors));
  // Latency of one warp, issue slots of all of them, and memory overlap in part: hence the 2-norm.
  const double blocks = v.chunk > 0 ? std::ceil(length / v.chunk) - 1 : 0;
  const double shared_cycles =
      v.chunk > 0 ? (blocks + 1) * kBarrierCycles + blocks * kTokenCycles * v.chunk / v.scan_warps : 0;
  const double chain_us = waves * (kLoadCycles + length * chain + shared_cycles) / kCyclesPerUs;
  const double issue_us = warps / (4.0 * t.multiprocessors) * (setup + length * issue) / kCyclesPerUs;
  const double memory_us = bytes_of(p, spread, v, s) / kBytesPerUs;
  return launch_us + std::hypot(chain_us, issue_us, memory_us) + 0.01 * v.scan_warps;
}

} // namespace

const Family kTokenFamily{"recurrent.cu", kernel_entries, variants, launch_list, buffers, estimate};
const Family kReplayFamily{"replay.cu", kernel_entries, variants, launch_list, buffers, estimate};

} // namespace kda
