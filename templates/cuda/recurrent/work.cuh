#pragma once
// How the recurrence is spread over warps: a warp owns Config::rows rows (of V) of one state, K lies across
// the lanes. The warps of a CTA own neighbouring rows of one state.
#include "kernel_args.cuh"
#include "stages/token_load.cuh"

namespace kda {

using State = Config::State;
using Spread = RowSpread<Config::K, Config::lanes>;

constexpr int kLanes = Spread::lanes;
constexpr int kChannels = Spread::elements;        // of K, held by a lane
constexpr int kRows = Config::rows / Spread::rows; // of V, held by a lane
constexpr int kTiles = (Config::V + Config::rows - 1) / Config::rows;
constexpr int kHeadCtas = (kTiles + Config::scan_warps - 1) / Config::scan_warps;
constexpr bool kWholeTiles = Config::V % Config::rows == 0;
static_assert(kRows >= 1 && (kRows & (kRows - 1)) == 0);
// A token's reduction leaves kSlots of its 2 * kRows sums in a lane, the same ones in kSpan neighbouring
// lanes: a of some rows in the lower half of the lanes of a row, b of the same rows in the upper half.
constexpr int kSlots = 2 * kRows > kLanes ? 2 * kRows / kLanes : 1;
constexpr int kSpan = 2 * kRows < kLanes ? kLanes / (2 * kRows) : 1;

/// What a warp works on.
struct Work {
  i64 begin, end; ///< tokens of batch row `batch`
  u32 sequence, batch, value_head;
  int lane, part; ///< lane of a row of K; which of Spread::rows
  int cta_row;    ///< first V row of the CTA
  int row;        ///< first V row of this lane
  int sum_row;    ///< first V row whose sums this lane gets
  bool idle;      ///< the CTA has more warps than the head has tiles left
};

/// Row `row` of V exists; known at compile time where tiles divide V.
KDA_DEVICE bool is_row(int row) {
  return kWholeTiles || row < Config::V;
}

/// A CTA is numbered by tiles, then heads, then sequences.
KDA_DEVICE Work find_work(const KernelArgs& args) {
  Work w;
  const u32 block = static_cast<u32>(block_index_x());
  const u32 heads = static_cast<u32>(args.value_heads), head = block / kHeadCtas;
  w.sequence = static_cast<u32>(u64{head} * args.head_reciprocal >> 32);
  w.value_head = head - w.sequence * heads;
  if (w.value_head >= heads) {
    ++w.sequence;
    w.value_head -= heads;
  }
  const int tile = static_cast<int>(block % kHeadCtas) * Config::scan_warps;
  w.cta_row = tile * Config::rows;
  const int warp = Config::scan_warps > 1 ? warp_index() : 0;
  w.idle = kTiles % Config::scan_warps != 0 && tile + warp >= kTiles;
  w.lane = lane_index() % kLanes;
  w.part = lane_index() / kLanes;
  w.row = w.cta_row + warp * Config::rows + w.part * kRows;
  w.sum_row = w.row + w.lane % (kLanes / 2) / kSpan * kSlots;
  if constexpr (Config::varlen) {
    // The sequence after the last one is the padding behind the packed tokens.
    const auto* cu = static_cast<const Config::Index*>(args.cu_seqlens);
    w.batch = 0;
    w.begin = cu[w.sequence];
    w.end =
        w.sequence < static_cast<u32>(args.sequences) ? static_cast<i64>(cu[w.sequence + 1]) : args.tokens;
  } else {
    w.batch = w.sequence;
    w.begin = 0;
    w.end = args.tokens;
  }
  return w;
}

/// For tokens after the first: their addresses are computed when they come, so that a call of one token does
/// not pay for them.
KDA_DEVICE Work later(Work w) {
  w.batch = hide(w.batch);
  w.value_head = hide(w.value_head);
  return w;
}

/// What comes before all else: nothing may be read before the kernels that may have written it have ended.
KDA_DEVICE void begin_kernel() {
  if constexpr (Config::overlap) {
    wait_for_kernel_before();
    start_kernel_behind();
  }
}

} // namespace kda
