#pragma once
// How the recurrence is spread over warps: a warp owns Config::rows rows (of V) of one state, K lies across
// the lanes.
#include "kernel_args.cuh"
#include "stages/token_load.cuh"

namespace kda {

using State = Config::State;
using Spread = RowSpread<Config::K>;

constexpr int kLanes = Spread::lanes;
constexpr int kChannels = Spread::elements;        // of K, held by a lane
constexpr int kRows = Config::rows / Spread::rows; // of V, held by a lane
constexpr int kTiles = (Config::V + Config::rows - 1) / Config::rows;
static_assert(kRows >= 1 && (kRows & (kRows - 1)) == 0);
// A token's reduction leaves kSlots of its 2 * kRows sums in a lane, the same ones in kSpan neighbouring
// lanes: a of some rows in the lower half of the lanes of a row, b of the same rows in the upper half.
constexpr int kSlots = 2 * kRows > kLanes ? 2 * kRows / kLanes : 1;
constexpr int kSpan = 2 * kRows < kLanes ? kLanes / (2 * kRows) : 1;

/// What a warp works on.
struct Work {
  i64 sequence, batch, begin, end; ///< tokens [begin, end) of batch row `batch`
  int value_head;
  int lane, part; ///< lane of a row of K; which of Spread::rows
  int row;        ///< first V row of this lane
  int sum_row;    ///< first V row whose sums this lane gets
};

KDA_DEVICE Work find_work(const KernelArgs& args, i64 unit) {
  Work w;
  const int tile = static_cast<int>(unit % kTiles);
  unit /= kTiles;
  w.value_head = static_cast<int>(unit % args.value_heads);
  w.sequence = unit / args.value_heads;
  w.lane = lane_index() % kLanes;
  w.part = lane_index() / kLanes;
  w.row = tile * Config::rows + w.part * kRows;
  w.sum_row = w.row + w.lane % (kLanes / 2) / kSpan * kSlots;
  if constexpr (Config::varlen) {
    // The sequence after the last one is the padding behind the packed tokens.
    const auto* cu = static_cast<const Config::Index*>(args.cu_seqlens);
    w.batch = 0;
    w.begin = cu[w.sequence];
    w.end = w.sequence < args.sequences ? static_cast<i64>(cu[w.sequence + 1]) : args.tokens;
  } else {
    w.batch = w.sequence;
    w.begin = 0;
    w.end = args.tokens;
  }
  return w;
}

/// Warps of work of a call whose padding behind packed tokens is work too, or is not.
KDA_DEVICE i64 work_units(const KernelArgs& args, bool padding) {
  return (args.sequences + (Config::varlen && padding ? 1LL : 0LL)) * args.value_heads * kTiles;
}

} // namespace kda
