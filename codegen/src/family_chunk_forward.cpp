// Sizes and launches of chunk_forward.cu. The constants of the templates (chunk_forward/*.cuh) stand here a
// second time, as functions of problem and variant.
#include "family_chunk.h"

namespace kda {
namespace {

/// chunk_forward/scan.cuh.
int scan_shared(const Problem& p, const Variant& v) {
  const int values = v.chunk * padded(p.value_dim) * 2;
  return v.stages * (record_bytes(p, v) - values + v.value_tile * v.chunk * 2);
}
/// Registers of a scan thread, fitted to ptxas 13.0: the state and its bf16 copy, and what one tile of tokens
/// or two at a time need. From kMostRegisters on some architecture spills.
constexpr int kMostRegisters = 248;
int scan_registers(const Problem& p, const Variant& v) {
  return 9 * padded(p.key_dim) / 16 + (v.chunk == 64 ? 140 : v.chunk == 32 ? 128 : 80);
}

std::string reject(const Problem& p, const Target& t, const Variant& v) {
  if (std::string why = reject_tiles(p, v); !why.empty()) return why;
  return reject_limits(t, scan_registers(p, v), kMostRegisters, {prepare_shared(p, v), scan_shared(p, v)});
}

std::vector<std::string> kernel_entries(const Problem& p, const Variant&) {
  if (p.varlen) return {"kda_forward_prepare", "kda_forward_scan", "kda_schedule"};
  return {"kda_forward_prepare", "kda_forward_scan"};
}

void variants(const Problem& p, const Target& t, std::vector<Candidate>& all) {
  for (const int chunk : {64, 32, 16})
    for (const int value_tile : {64, 128, 32, 16})
      for (const int prepare_warps : {4, 8})
        for (const int scan_warps : {4, 8})
          for (const int stages : {3, 2, 4}) {
            Variant v;
            v.algorithm = Algorithm::chunk;
            v.chunk = chunk;
            v.value_tile = value_tile;
            v.prepare_warps = prepare_warps;
            v.scan_warps = scan_warps;
            v.stages = stages;
            all.push_back({v, reject(p, t, v)});
          }
}

/// One a sequence, value head and value tile; packed, one more sequence zeros what lies behind the last.
std::int64_t scan_ctas(const Problem& p, const Variant& v, const Sizes& s) {
  return (s.sequences + (p.varlen ? 1 : 0)) * p.value_heads * value_tiles(p, v);
}

LaunchList launch_list(const Problem& p, const Variant& v, const Target&, const Sizes& s) {
  LaunchList list;
  if (p.varlen) list.add(2, 1, 8 * 32, 8 * 4);
  list.add(0, prepare_ctas(p, v, s), v.prepare_warps * 32, prepare_shared(p, v));
  list.add(1, scan_ctas(p, v, s), v.scan_warps * 32, scan_shared(p, v));
  return list;
}

/// Slot 0: first chunk of each sequence, int [N + 1] (packed only). Slot 1: records [chunk][value head].
WorkspaceLayout buffers(const Problem& p, const Variant& v, const Sizes& s) {
  WorkspaceLayout layout;
  layout.add(p.varlen ? static_cast<std::size_t>(s.sequences + 1) * sizeof(int) : 0);
  layout.add(static_cast<std::size_t>(chunk_bound(p, s, v.chunk)) * static_cast<std::size_t>(p.value_heads) *
             static_cast<std::size_t>(record_bytes(p, v)));
  return layout;
}

// Fitted to an H100 80GB HBM3 (K = V = 128, T = 1024 to 8192, H = 4 to 96): 6 % off on average.
constexpr double kScanUs = 6;
constexpr double kScheduleUs = 4;
constexpr double kBarrierUs = 0.15; // of a chunk: barrier and first reads
constexpr double kCopyUs = 0.13;    // of a chunk, where the warps that multiply also copy
constexpr double kTileUs = 0.36;    // 16 tokens: the chain of one warp at K = 128
constexpr double kWarpTileUs = 0.1; // 16 tokens of one warp when shared-memory reads are the limit

double scan_us(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  const double tokens = static_cast<double>(s.batch * s.tokens);
  const double chunks = std::ceil(tokens / std::max(1.0, static_cast<double>(s.sequences)) / v.chunk);
  const int per_sm = std::clamp(std::min(t.shared_bytes_per_sm / (scan_shared(p, v) + 1024),
                                         t.registers_per_sm / (scan_registers(p, v) * 32 * v.scan_warps)),
                                1, 16);
  const double ctas = static_cast<double>(s.sequences) * p.value_heads * value_tiles(p, v);
  const double slots = static_cast<double>(t.multiprocessors) * per_sm;
  const double waves = std::max(1.0, std::ceil(ctas / slots));
  const double resident = std::max(1.0, std::ceil(std::min(ctas, slots) / t.multiprocessors));
  const int warps = std::min(v.value_tile, padded(p.value_dim)) / 16; // that multiply
  const double tile = std::max(kTileUs, kWarpTileUs * resident * warps) * padded(p.key_dim) / 128;
  const double step =
      kBarrierUs + (v.scan_warps > v.value_tile / 16 ? 0 : kCopyUs) + tile * v.chunk / kTileRows;

  const double u = p.value_dim * 2.0;
  const double record = static_cast<double>(record_bytes(p, v)) / v.chunk;
  const double heads = tokens * p.value_heads;
  const double states = 2.0 * static_cast<double>(s.sequences) * p.value_heads * p.key_dim * p.value_dim *
                        size_of(p.state_dtype);
  const double memory = std::max((heads * (record + p.value_dim * size_of(p.dtype)) + states) / kBytesPerUs,
                                 heads * ((record - u) * value_tiles(p, v) + u) / kL2BytesPerUs);
  return kScanUs + std::max(memory, waves * chunks * step);
}

double estimate(const Problem& p, const Variant& v, const Target& t, const Sizes& s) {
  return (p.varlen ? kScheduleUs : 0) + prepare_us(p, v, t, s) + scan_us(p, v, t, s);
}

} // namespace

const Family kChunkForwardFamily{"chunk_forward.cu", kernel_entries, variants,
                                 launch_list,        buffers,        estimate};

} // namespace kda
