// Sizes and launches of chunk_backward.cu. The constants of chunk_backward/*.cuh stand here a second time, as
// functions of problem and variant.
#include "family_chunk.h"

namespace kda {
namespace {

/// chunk_backward/scan.cuh.
int scan_shared(const Problem& p, const Variant& v) {
  const int k = padded(p.key_dim), key_tile = v.chunk * k * 2;
  const int forwards = 2 * key_tile + k * 4 + v.value_tile * v.chunk * 2;
  const int backwards = 3 * key_tile + chunk_pairs(v.chunk) * 512 + k * 4 + tile_bytes(v.chunk, v.value_tile);
  return v.stages * std::max(forwards, backwards);
}
/// Registers of a scan thread, fitted to ptxas 13.0: D and its bf16 copy, dO and dU. Beyond kMostRegisters it
/// spills.
constexpr int kMostRegisters = 250;
int scan_registers(const Problem& p, const Variant& v) {
  const int k = padded(p.key_dim);
  return v.chunk == 64 ? 106 + 9 * k / 8 : v.chunk == 32 ? 96 + 27 * k / 32 : 200;
}

/// chunk_backward/gradients.cuh.
int gradient_shared(const Problem& p, const Variant& v) {
  const int k = padded(p.key_dim), value = padded(p.value_dim), tiles = v.chunk / kTileRows;
  const int table = v.chunk * (k + 8) * 4;
  const int values = tile_bytes(v.chunk, value) + 2 * value * v.chunk * 2;
  const int sums = 3 * tiles * k * 4 + k * 4;
  const int rows = (4 + 4 * v.prepare_warps) * v.chunk * 4;
  return (3 * tile_bytes(v.chunk, k) + 2 * table + 2 * tile_bytes(v.chunk, v.chunk) +
          std::max(values, table) + sums + rows + 24 + 15) /
         16 * 16;
}

std::string reject(const Problem& p, const Target& t, const Variant& v) {
  if (std::string why = reject_tiles(p, v); !why.empty()) return why;
  const int tiles = v.chunk / kTileRows, blocks = padded(p.key_dim) / 16;
  if (const int threads = v.prepare_warps * 32 / tiles; threads * 4 < padded(p.key_dim))
    return fmt::format("{} threads with 4 channels each do not cover K={}", threads, p.key_dim);
  // A warp holds three accumulators for each of its blocks of 16 channels and tiles of 16 tokens.
  if (const int held = (blocks + v.prepare_warps - 1) / v.prepare_warps * tiles; held > 4)
    return fmt::format("{} warps would hold the gradients of {} blocks of 16x16 each, 4 fit", v.prepare_warps,
                       held);
  return reject_limits(t, scan_registers(p, v), kMostRegisters,
                       {prepare_shared(p, v), scan_shared(p, v), gradient_shared(p, v)});
}

std::vector<std::string> kernel_entries(const Problem&, const Variant&) {
  return {"kda_prepare",         "kda_backward_scan",  "kda_backward_gradients",
          "kda_backward_reduce", "kda_backward_group", "kda_schedule"};
}

void variants(const Problem& p, const Target& t, std::vector<Candidate>& all) {
  for (const int chunk : {64, 32, 16})
    for (const int value_tile : {64, 32, 128, 16})
      for (const int prepare_warps : {8, 4})
        for (const int stages : {2, 3}) {
          Variant v;
          v.algorithm = Algorithm::chunk;
          v.chunk = chunk;
          v.value_tile = value_tile;
          v.prepare_warps = prepare_warps;
          v.scan_warps = value_tile == 128 ? 8 : 4; // the state takes every register of 8 warps
          v.stages = stages;
          all.push_back({v, reject(p, t, v)});
        }
}

/// Both directions; packed, one more sequence zeros what lies behind the last.
std::int64_t scan_ctas(const Problem& p, const Variant& v, const Sizes& s) {
  return 2 * (s.sequences + (p.varlen ? 1 : 0)) * p.value_heads * value_tiles(p, v);
}
bool has_parameters(const Problem& p) {
  return p.dt_bias || reads_a_log(p.gate);
}
bool grouped(const Problem& p) {
  return p.value_heads != p.heads;
}

LaunchList launch_list(const Problem& p, const Variant& v, const Target&, const Sizes& s) {
  constexpr int kReduceThreads = 512, kGroupThreads = 256, kScheduleThreads = 256;
  LaunchList list;
  if (p.varlen) list.add(5, 1, kScheduleThreads, kScheduleThreads / 32 * 4);
  list.add(0, prepare_ctas(p, v, s), v.prepare_warps * 32, prepare_shared(p, v));
  list.add(1, scan_ctas(p, v, s), v.scan_warps * 32, scan_shared(p, v));
  list.add(2, chunk_bound(p, s, v.chunk) * p.value_heads, v.prepare_warps * 32, gradient_shared(p, v));
  if (has_parameters(p)) list.add(3, p.value_heads, kReduceThreads, kReduceThreads * 4);
  const std::int64_t items = s.batch * s.tokens * p.heads * (p.key_dim / 4);
  if (grouped(p)) list.add(4, (items + kGroupThreads - 1) / kGroupThreads, kGroupThreads, 0);
  return list;
}

/// The slots that chunk_backward/workspace.cuh lists.
WorkspaceLayout buffers(const Problem& p, const Variant& v, const Sizes& s) {
  const auto chunks =
      static_cast<std::size_t>(chunk_bound(p, s, v.chunk)) * static_cast<std::size_t>(p.value_heads);
  const auto keys = static_cast<std::size_t>(padded(p.key_dim)),
             values = static_cast<std::size_t>(padded(p.value_dim)),
             tokens = static_cast<std::size_t>(v.chunk);
  const std::size_t states = chunks * keys * values * 2, rows = chunks * tokens * values * 2;
  const std::size_t parts = grouped(p) ? static_cast<std::size_t>(s.batch * s.tokens * p.value_heads) *
                                             static_cast<std::size_t>(p.key_dim) * sizeof(float)
                                       : 0;
  WorkspaceLayout layout;
  layout.add(p.varlen ? static_cast<std::size_t>(s.sequences + 1) * sizeof(int) : 0);
  layout.add(chunks * static_cast<std::size_t>(record_bytes(p, v)));
  for (const std::size_t bytes : {states, states, rows, 2 * rows})
    layout.add(bytes);
  layout.add(p.dt_bias ? chunks * keys * sizeof(float) : 0);
  layout.add(reads_a_log(p.gate) ? chunks * sizeof(float) : 0);
  layout.add(parts);
  layout.add(parts);
  return layout;
}

// First guesses for an H100 from the forward's constants.
constexpr double kScanUs = 6, kStepUs = 0.3, kTileUs = 0.5, kWarpTileUs = 0.12;
constexpr double kGradientsUs = 10, kGradientBlockUs = 16; // of 64 tokens

double scan_us(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  const double tokens = static_cast<double>(s.batch * s.tokens);
  const double chunks = std::ceil(tokens / std::max(1.0, static_cast<double>(s.sequences)) / v.chunk);
  const int per_sm = std::clamp(std::min(t.shared_bytes_per_sm / (scan_shared(p, v) + 1024),
                                         t.registers_per_sm / (scan_registers(p, v) * 32 * v.scan_warps)),
                                1, 16);
  const double ctas = 2.0 * static_cast<double>(s.sequences) * p.value_heads * value_tiles(p, v);
  const double slots = static_cast<double>(t.multiprocessors) * per_sm;
  const double waves = std::max(1.0, std::ceil(ctas / slots));
  const double resident = std::max(1.0, std::ceil(std::min(ctas, slots) / t.multiprocessors));
  const int warps = std::min(v.value_tile, padded(p.value_dim)) / 16; // that multiply
  const double tile = std::max(kTileUs, kWarpTileUs * resident * warps) * padded(p.key_dim) / 128;
  const double step = kStepUs + tile * v.chunk / kTileRows;
  const double heads = tokens * p.value_heads;
  const double written = 4.0 * p.value_dim + 4.0 * p.key_dim * p.value_dim / v.chunk;
  const double read = 2.0 * static_cast<double>(record_bytes(p, v)) / v.chunk;
  return kScanUs + std::max(heads * (read + written) / kBytesPerUs, waves * chunks * step);
}

double gradients_us(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  const double tokens = static_cast<double>(chunk_bound(p, s, v.chunk)) * v.chunk * p.value_heads;
  const double inputs = 2.0 * (3.0 * p.key_dim + 2.0 * p.value_dim) * 2.0, values = 4.0 * p.value_dim;
  const double states = 4.0 * p.key_dim * p.value_dim / v.chunk;
  const int resident = std::clamp(t.shared_bytes_per_sm / (gradient_shared(p, v) + 1024), 1, 2);
  const double busy = tokens / 64 * kGradientBlockUs * (v.chunk == 64 ? 1.0 : 1.15) *
                      (padded(p.key_dim) / 128.0) * (resident == 2 ? 0.75 : 1.0) / t.multiprocessors;
  return kGradientsUs + std::max(tokens * (inputs + values + states) / kBytesPerUs, busy);
}

double estimate(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  return prepare_us(p, v, t, s) + scan_us(p, v, t, s) + gradients_us(p, v, t, s);
}

} // namespace

const Family kChunkBackwardFamily{"chunk_backward.cu", kernel_entries, variants,
                                  launch_list,         buffers,        estimate};

} // namespace kda
