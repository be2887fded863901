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
constexpr Spread spread_of(int key_dim) {
  const int groups = key_dim / 4;
  int lanes = 4;
  while (lanes < groups && lanes < 32)
    lanes *= 2;
  return {lanes, 4 * ((groups + lanes - 1) / lanes), 32 / lanes};
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
  const Spread spread = spread_of(p.key_dim);
  if (v.rows < spread.rows)
    return fmt::format("a warp works on {} rows at a time at K={}", spread.rows, p.key_dim);
  if (v.rows > std::max(padded(p.value_dim), spread.rows))
    return fmt::format("{} rows a warp are more than V={} has", v.rows, p.value_dim);
  if (p.tree && v.stages > 1) return "the tokens of a tree are not in order: nothing to load ahead";
  constexpr double kMostRegisters = 248; // 255 with a margin for what the fit misses
  const double need = registers(p, spread, v);
  if (need > kMostRegisters) return fmt::format("needs about {:.0f} registers a thread of 255", need);
  if (need * 32 * v.scan_warps > t.registers_per_sm)
    return fmt::format("needs about {:.0f} registers for {} warps, more than an SM has", need, v.scan_warps);
  return {};
}

std::vector<std::string> kernel_entries(const Problem& p) {
  return {p.operation == Operation::replay ? "kda_replay" : "kda_recurrent"};
}

void variants(const Problem& p, const Target& t, std::vector<Candidate>& all) {
  for (const int stages : {1, 4}) {
    if (stages > 1 && p.operation == Operation::replay) continue; // one load a token, nothing to prepare
    for (const int rows : {1, 2, 4, 8, 16, 32})
      for (const int warps : {1, 4}) {
        Variant v;
        v.algorithm = Algorithm::token;
        v.rows = rows;
        v.scan_warps = warps;
        v.stages = stages;
        all.push_back({v, reject(p, t, v)});
      }
  }
}

/// Warps of work: one a tile of rows of each state, and as many again for the padding behind packed tokens.
std::int64_t units(const Problem& p, const Variant& v, const Sizes& s) {
  const std::int64_t sequences = s.sequences + (p.varlen && p.operation != Operation::replay ? 1 : 0);
  return sequences * p.value_heads * ((p.value_dim + v.rows - 1) / v.rows);
}

LaunchList launch_list(const Problem& p, const Variant& v, const Target&, const Sizes& s) {
  LaunchList list;
  list.add(0, (units(p, v, s) + v.scan_warps - 1) / v.scan_warps, v.scan_warps * 32, 0);
  return list;
}

WorkspaceLayout buffers(const Problem&, const Variant&, const Sizes&) {
  return {};
}

/// Bytes that must move: every token tensor once, and the states in and out.
double bytes_of(const Problem& p, const Spread& spread, const Variant& v, const Sizes& s) {
  const double tokens = static_cast<double>(s.batch) * static_cast<double>(s.tokens);
  const double per_token = 2.0 * p.heads * p.key_dim * size_of(p.dtype) +
                           p.value_heads * (2.0 * p.value_dim * size_of(p.dtype) +
                                            p.key_dim * size_of(p.gate_dtype) + size_of(p.beta_dtype));
  const double state = 2.0 * static_cast<double>(s.sequences) * p.value_heads * p.key_dim * p.value_dim *
                       size_of(p.state_dtype);
  // [K,V]: a lane's rows are neighbours and its channels are not, so narrow rows waste most of every sector.
  const int rows = v.rows / spread.rows;
  double waste = 1;
  if (p.state_layout == StateLayout::k_v) waste = rows >= 8 ? 1.75 : rows >= 4 ? 2 : 6.5;
  return tokens * per_token + waste * state;
}

/// Fitted to 18 shapes with every variant on an H100 (1 to 4,096 tokens): the choice costs 4% over the best
/// variant in the median and 22% at worst. Cycles are those of a warp.
double estimate(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  constexpr double kBytesPerUs = 3.0e6; // device copy
  constexpr double kCyclesPerUs = 1980;
  constexpr double kLaunchUs = 2.5;
  constexpr double kLoadCycles = 900; // first loads to last store of a warp
  const bool pipelined = v.stages > 1;
  const Spread spread = spread_of(p.key_dim);
  const double channel_cycles = p.gate == GateKind::softplus ? 90 : 50; // gate and norm
  const double issue = 120 + channel_cycles * spread.channels + 8.3 * state_floats(spread, v);
  const double chain = issue + (pipelined ? 260 : 500);
  const double setup = pipelined ? 850 : 300;

  const double sequences = std::max(1.0, static_cast<double>(s.sequences));
  const double length = static_cast<double>(s.batch) * static_cast<double>(s.tokens) / sequences;
  const int tiles = (p.value_dim + v.rows - 1) / v.rows;
  const double warps = sequences * p.value_heads * tiles;
  const double resident = std::clamp(std::floor(2048 / registers(p, spread, v)), 1.0, 64.0);
  const double waves = std::ceil(warps / (resident * t.multiprocessors));
  // Latency of one warp, issue slots of all of them, and memory overlap in part: hence the 2-norm.
  const double chain_us = waves * (kLoadCycles + length * chain) / kCyclesPerUs;
  const double issue_us = warps / (4.0 * t.multiprocessors) * (setup + length * issue) / kCyclesPerUs;
  const double memory_us = bytes_of(p, spread, v, s) / kBytesPerUs;
  return kLaunchUs + std::hypot(chain_us, issue_us, memory_us) + 0.01 * v.scan_warps;
}

} // namespace

const Family kTokenFamily{"recurrent.cu", kernel_entries, variants, launch_list, buffers, estimate};
const Family kReplayFamily{"replay.cu", kernel_entries, variants, launch_list, buffers, estimate};

} // namespace kda
