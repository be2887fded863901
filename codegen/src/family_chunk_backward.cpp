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

enum Entry { prepare, scan, gradients, reduce, group, schedule, factors, states };
std::vector<std::string> kernel_entries(const Problem&, const Variant& v) {
  std::vector<std::string> all{"kda_prepare",         "kda_backward_scan",  "kda_backward_gradients",
                               "kda_backward_reduce", "kda_backward_group", "kda_schedule"};
  if (v.slab != 0) all.insert(all.end(), {"kda_backward_factors", "kda_backward_states"});
  return all;
}

/// Slabs are tried with the tiles that are likely to be best: each doubles what a tuner compiles.
bool takes_slabs(const Problem& p, const Variant& v) {
  return v.stages == 2 && v.value_tile <= 64 && v.value_tile >= std::min(padded(p.value_dim), 32) / 32 * 32;
}

void variants(const Problem& p, const Target& t, std::vector<Candidate>& all) {
  for (const int slab : {0, 512, 2048})
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
            v.slab = slab;
            if (slab == 0 || takes_slabs(p, v)) all.push_back({v, reject(p, t, v)});
          }
}

bool has_parameters(const Problem& p) {
  return p.dt_bias || reads_a_log(p.gate);
}
bool grouped(const Problem& p) {
  return p.value_heads != p.heads;
}
/// The forward's states are missing, and found again before the backward proper.
bool finds_states(const Problem& p) {
  return p.saved_interval == 0;
}

constexpr std::int64_t up(std::int64_t x, std::int64_t unit) {
  return (x + unit - 1) / unit;
}

/// Slabs of `tokens` tokens. Pieces of a row are no shorter than kLeastPiece where they can be: each costs
/// two states, and the step from one to the next costs launches.
Slabs slabs_of(const Problem& p, const Variant& v, const Sizes& s, std::int64_t tokens) {
  constexpr std::int64_t kLeastPiece = 512;
  const std::int64_t chunks = up(tokens, v.chunk), unit = std::max(p.saved_interval / v.chunk, 1);
  Slabs slabs;
  if (p.varlen) {
    const std::int64_t size = std::max(chunks, unit);
    slabs.count = slabs.pieces =
        static_cast<int>(std::max<std::int64_t>(up(chunk_bound(p, s, v.chunk), size), 1));
    slabs.chunks = static_cast<int>(size);
    slabs.rows = static_cast<int>(std::min(s.sequences, 2 * up(s.sequences, slabs.count)));
    return slabs;
  }
  const std::int64_t row = std::max<std::int64_t>(up(s.tokens, v.chunk), 1),
                     rows = std::max<std::int64_t>(s.batch, 1);
  std::int64_t piece = std::max(chunks / rows, std::min(chunks, up(kLeastPiece, v.chunk)));
  piece = std::min(std::max(piece / unit, std::int64_t{1}) * unit, row);
  slabs.chunks = static_cast<int>(piece);
  slabs.rows = static_cast<int>(std::clamp(chunks / piece, std::int64_t{1}, rows));
  slabs.pieces = static_cast<int>(up(row, piece));
  slabs.count = static_cast<int>(up(s.batch, slabs.rows)) * slabs.pieces;
  return slabs;
}
/// Slabs of Variant::slab tokens, or of twice as many and so on, so that launches stay few.
Slabs slabs_of(const Problem& p, const Variant& v, const Sizes& s) {
  if (v.slab == 0) return {};
  const int launches = 3 + (grouped(p) ? 1 : 0) + (finds_states(p) ? 2 : 0);
  for (std::int64_t tokens = v.slab;; tokens *= 2)
    if (const Slabs slabs = slabs_of(p, v, s, tokens); slabs.count * launches <= LaunchList::kMost - 2)
      return slabs;
}
/// Chunks that the workspace has a place for. Packed slabs reach back to where a state was saved.
std::int64_t workspace_chunks(const Problem& p, const Variant& v, const Sizes& s, const Slabs& slabs) {
  const std::int64_t all = chunk_bound(p, s, v.chunk);
  if (v.slab == 0) return all;
  if (!p.varlen) return std::min(all, std::int64_t{slabs.chunks} * slabs.rows);
  return std::min(all, slabs.chunks + std::int64_t{std::max(p.saved_interval / v.chunk, 1)} - 1);
}

/// What one walk over a slab takes.
class Launches {
public:
  Launches(const Problem& p, const Variant& v, const Sizes& s)
      : p_(p), v_(v), slabs_(slabs_of(p, v, s)), chunks_(workspace_chunks(p, v, s, slabs_)),
        units_(v.slab == 0 ? s.sequences : slabs_.rows) {
    list_.slabs = slabs_;
  }
  LaunchList run() {
    constexpr int kReduceThreads = 512, kScheduleThreads = 256;
    if (p_.varlen) list_.add(schedule, 1, kScheduleThreads, kScheduleThreads / 32 * 4);
    const int pieces = v_.slab == 0 ? 1 : slabs_.pieces;
    for (int first = 0; first < slabs_.count; first += pieces) {
      for (int slab = first; finds_states(p_) && slab + 1 < first + pieces; ++slab)
        find_states(slab);
      for (int slab = first + pieces; slab-- > first;)
        walk(slab);
    }
    if (has_parameters(p_)) list_.add(reduce, p_.value_heads, kReduceThreads, kReduceThreads * 4);
    return list_;
  }

private:
  void add_prepare(Entry entry, int slab) {
    list_.add(entry, up(chunks_, prepare_chunks(p_, v_)) * p_.value_heads, v_.prepare_warps * 32,
              prepare_shared(p_, v_), false, slab);
  }
  void find_states(int slab) {
    add_prepare(factors, slab);
    list_.add(states, units_ * p_.value_heads * value_tiles(p_, v_), v_.scan_warps * 32, scan_shared(p_, v_),
              false, slab);
  }
  /// The scan goes both ways; packed, one unit more of slab 0 zeros what lies behind the last sequence.
  void walk(int slab) {
    constexpr int kGroupThreads = 256;
    add_prepare(prepare, slab);
    const std::int64_t padding = p_.varlen && slab == 0 ? 1 : 0;
    list_.add(scan, 2 * (units_ + padding) * p_.value_heads * value_tiles(p_, v_), v_.scan_warps * 32,
              scan_shared(p_, v_), false, slab);
    list_.add(gradients, chunks_ * p_.value_heads, v_.prepare_warps * 32, gradient_shared(p_, v_), false,
              slab);
    if (grouped(p_)) list_.add(group, chunks_ * p_.heads, kGroupThreads, 0, false, slab);
  }

  const Problem& p_;
  const Variant& v_;
  Slabs slabs_;
  std::int64_t chunks_, units_;
  LaunchList list_;
};

LaunchList launch_list(const Problem& p, const Variant& v, const Target&, const Sizes& s) {
  return Launches(p, v, s).run();
}

/// The slots that chunk_backward/workspace.cuh and slab.cuh list.
WorkspaceLayout buffers(const Problem& p, const Variant& v, const Sizes& s) {
  const Slabs slabs = slabs_of(p, v, s);
  const auto heads = static_cast<std::size_t>(p.value_heads);
  const std::size_t all = static_cast<std::size_t>(chunk_bound(p, s, v.chunk)) * heads,
                    chunks = static_cast<std::size_t>(workspace_chunks(p, v, s, slabs)) * heads;
  const auto keys = static_cast<std::size_t>(padded(p.key_dim)),
             values = static_cast<std::size_t>(padded(p.value_dim)),
             tokens = static_cast<std::size_t>(v.chunk);
  const std::size_t states = chunks * keys * values * 2, rows = chunks * tokens * values * 2;
  const std::size_t parts =
      grouped(p) ? chunks * tokens * static_cast<std::size_t>(p.key_dim) * sizeof(float) : 0;
  WorkspaceLayout layout;
  layout.add(p.varlen ? static_cast<std::size_t>(s.sequences + 1) * sizeof(int) : 0);
  layout.add(chunks * static_cast<std::size_t>(record_bytes(p, v)));
  for (const std::size_t bytes : {states, states, rows, 2 * rows})
    layout.add(bytes);
  layout.add(p.dt_bias ? all * keys * sizeof(float) : 0);
  layout.add(reads_a_log(p.gate) ? all * sizeof(float) : 0);
  layout.add(parts);
  layout.add(parts);
  if (v.slab == 0) return layout;
  const auto boundaries = static_cast<std::size_t>(slabs.pieces - 1), // of one group of rows
      rows_across = static_cast<std::size_t>(p.varlen ? 1 : slabs.rows);
  const std::size_t carry = heads * keys * values * sizeof(float);
  layout.add(p.varlen ? (boundaries + 2) * 2 * sizeof(int) : 0);
  layout.add(finds_states(p) ? boundaries * rows_across * carry : 0);
  layout.add(boundaries == 0 ? 0 : (p.varlen ? 2 : rows_across) * carry);
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

/// Every slab pays for its launches, and what fits L2 counts as if it did not.
double estimate(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  constexpr double kStatesShare = 0.5; // of a scan: one direction, and nothing written
  if (v.slab == 0) return prepare_us(p, v, t, s) + scan_us(p, v, t, s) + gradients_us(p, v, t, s);
  const Slabs slabs = slabs_of(p, v, s);
  const std::int64_t tokens = std::int64_t{slabs.chunks} * v.chunk;
  const Sizes one =
      p.varlen ? Sizes{1, tokens, up(s.sequences, slabs.count)} : Sizes{slabs.rows, tokens, slabs.rows};
  const double prepared = prepare_us(p, v, t, one), scanned = scan_us(p, v, t, one);
  double us = slabs.count * (prepared + scanned + gradients_us(p, v, t, one));
  const int groups = slabs.count / slabs.pieces;
  if (finds_states(p)) us += (slabs.count - groups) * (prepared + kStatesShare * scanned);
  return us;
}

} // namespace

const Family kChunkBackwardFamily{"chunk_backward.cu", kernel_entries, variants,
                                  launch_list,         buffers,        estimate};

} // namespace kda
