#pragma once
// Decays of a tile of 16 tokens, channel by channel: a thread owns `width` neighbouring channels of one tile,
// so the running sums over tokens need no shuffle.
//
// Every decay factor is 2 to a sum of the gates between two tokens, never to a difference of two running
// sums, so gates of -inf give 0 and nothing cancels. Factors that only L and M see are anchored at row
// kAnchorRow of their tile, with gates clamped at kPairGateFloor: one side of a product then reaches 2^108,
// the other 2^-122 before |k|, and a term that the clamp or an underflow changes is below 2^-13.5 of its
// neighbours.
#include "stages/chunk_load.cuh"
#include "stages/gate.cuh"
#include "stages/tile.cuh"

namespace kda {

constexpr int kAnchorRow = 8;
constexpr float kPairGateFloor = -13.5f;
/// 2 to this is 0, and differences of sums stay finite.
constexpr float kGateFloor = -256.f;

/// How a CTA of `threads` spreads `tiles` tiles: threads of one tile are whole warps.
template <int threads, int tiles>
struct ChannelMap {
  static constexpr int tile_threads = threads / tiles;
  static constexpr int width = tile_threads * 2 >= kPaddedK ? 2 : 4;
  static_assert(tile_threads % 32 == 0 && tile_threads * width >= kPaddedK);
  int tile, channel; ///< the first of `width` channels
  bool active;       ///< channel < kPaddedK
  KDA_DEVICE ChannelMap()
      : tile(thread_index() / tile_threads), channel(thread_index() % tile_threads * width),
        active(channel < kPaddedK) {}
};

/// `width` neighbouring elements as they lie in memory.
template <class T, int width>
struct alignas(sizeof(T) * width) RawElements {
  u32 w[sizeof(T) * width / 4];
};
template <class T, int width>
KDA_DEVICE void load_elements(const T* p, float (&x)[width]) {
  const auto raw = *reinterpret_cast<const RawElements<T, width>*>(p);
#pragma unroll
  for (int i = 0; i < width; ++i)
    if constexpr (sizeof(T) == 4)
      x[i] = bits_float(raw.w[i]);
    else
      x[i] = i % 2 == 0 ? low_half<T>(raw.w[i / 2]) : high_half<T>(raw.w[i / 2]);
}
template <class T, int width>
KDA_DEVICE void store_elements(T* p, const float (&x)[width]) {
  RawElements<T, width> raw;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < width; ++i)
      raw.w[i] = float_bits(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < width; i += 2)
      raw.w[i / 2] = pack2<T>(x[i], x[i + 1]);
  }
  *reinterpret_cast<RawElements<T, width>*>(p) = raw;
}

/// Base-2 gates parked in fp32 in two 16-bit tiles, the upper and lower halves of their bits at the same
/// place, so that the thread that owns the channels can write operands over them.
template <int width>
KDA_DEVICE void park_gates(Operand* high, Operand* low, const float (&g)[width]) {
  RawElements<Operand, width> h, l;
#pragma unroll
  for (int i = 0; i < width; i += 2) {
    h.w[i / 2] = float_bits(g[i]) >> 16 | (float_bits(g[i + 1]) & 0xffff0000u);
    l.w[i / 2] = (float_bits(g[i]) & 0xffffu) | float_bits(g[i + 1]) << 16;
  }
  *reinterpret_cast<RawElements<Operand, width>*>(high) = h;
  *reinterpret_cast<RawElements<Operand, width>*>(low) = l;
}
template <int width>
KDA_DEVICE void unpark_gates(const Operand* high, const Operand* low, float (&g)[width]) {
  const auto h = *reinterpret_cast<const RawElements<Operand, width>*>(high);
  const auto l = *reinterpret_cast<const RawElements<Operand, width>*>(low);
#pragma unroll
  for (int i = 0; i < width; i += 2) {
    g[i] = bits_float(h.w[i / 2] << 16 | (l.w[i / 2] & 0xffffu));
    g[i + 1] = bits_float((h.w[i / 2] & 0xffff0000u) | l.w[i / 2] >> 16);
  }
}

/// Sums of base-2 gates per tile and channel, [tiles][kPaddedK] each. Clamped ones serve L and M only, are
/// finite and count from the chunk's start.
struct GateSums {
  float* total;  ///< of the tile's 16 rows
  float* start;  ///< clamped, before the tile
  float* anchor; ///< clamped, up to and with row kAnchorRow of the tile
};

/// Evaluates the gates of this thread's channels of its tile (which starts at row `first` of `chunk`), gives
/// those of each row of the tile to `park`(row, gates) and writes the tile's sums: `total`, and for
/// accumulate_anchors the clamped sum of all rows in `start` and of rows 0..kAnchorRow in `anchor`. Rows
/// behind the chunk's end and padding channels do not decay. No barrier.
template <class Map, class Park>
KDA_DEVICE void evaluate_gates(const KernelArgs& args, const Map& map, const ChunkSpan& chunk, int first,
                               i64 head, const GateSums& sums, const Park& park) {
  constexpr int width = Map::width;
  if (!map.active) return;
  const int channel = min(map.channel, Config::K - width); // padding channels read others
  const int rows = channel == map.channel ? chunk.rows - first : 0;
  float bias[width] = {}, a = 1.f;
  if constexpr (Config::dt_bias) load_elements<float, width>(args.dt_bias + head * Config::K + channel, bias);
  if constexpr (kReadsA) a = exp_clamped(args.A_log[head]);
  const auto* g = row_of<const Config::Gate>(args.g, chunk.batch, chunk.first, head) + channel;
  float total[width] = {}, anchor[width] = {}, whole[width] = {};
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    constexpr int kHalf = kTileRows / 2; // loads in flight
    float x[kHalf][width];
#pragma unroll
    for (int r = 0; r < kHalf; ++r) // rows behind the end read the last one again, or the first
      load_elements(g + max(min(first + half * kHalf + r, chunk.rows - 1), 0) * args.g.stride_token, x[r]);
#pragma unroll
    for (int r = 0; r < kHalf; ++r) {
      const int row = half * kHalf + r;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const float gate = max(gate_log2(x[r][i], bias[i], a, args.lower_bound), kGateFloor);
        x[r][i] = row < rows ? gate : 0.f;
        total[i] += x[r][i];
        whole[i] += max(x[r][i], kPairGateFloor);
        if (r == 0) anchor[i] = whole[i]; // of the second half: row kAnchorRow
      }
      park(row, x[r]);
    }
  }
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const int at = map.tile * kPaddedK + map.channel + i;
    sums.total[at] = total[i];
    sums.start[at] = whole[i];
    sums.anchor[at] = anchor[i];
  }
}

/// From sums of each tile to sums from the chunk's start. Needs a barrier before and after.
template <int threads, int tiles>
KDA_DEVICE void accumulate_anchors(const GateSums& sums) {
  for (int i = thread_index(); i < tiles / kChunkTiles * kPaddedK; i += threads) {
    float sum = 0.f;
#pragma unroll
    for (int t = 0; t < kChunkTiles; ++t) {
      const int at = (i / kPaddedK * kChunkTiles + t) * kPaddedK + i % kPaddedK;
      const float whole = sums.start[at];
      sums.start[at] = sum;
      sums.anchor[at] += sum;
      sum += whole;
    }
  }
}

/// Sum of the (unclamped) gates of the tiles of `tile`'s chunk before it, or after it.
template <bool after, int width>
KDA_DEVICE void sum_other_tiles(const GateSums& sums, int tile, int channel, float (&x)[width]) {
  const int local = tile % kChunkTiles;
#pragma unroll
  for (int t = 0; t < kChunkTiles; ++t)
#pragma unroll
    for (int i = 0; i < width; ++i)
      if (after ? t > local : t < local) x[i] += sums.total[(tile - local + t) * kPaddedK + channel + i];
}

/// Per row: scale / |q| and 1 / |k| (scale and 1 without the norm), from raw q and k in Tile<kPaddedK>.
/// Needs a barrier before (q and k) and after.
template <int threads, int rows>
KDA_DEVICE void write_row_factors(const Operand* q, const Operand* k, float scale, float* q_factor,
                                  float* k_factor) {
  if constexpr (!Config::qk_l2norm) {
    for (int row = thread_index(); row < rows; row += threads) {
      q_factor[row] = scale;
      k_factor[row] = 1.f;
    }
  } else {
    constexpr int parts = threads / rows; // neighbouring lanes share a row
    static_assert(parts >= 1 && parts <= 32);
    const int row = thread_index() / parts, part = thread_index() % parts;
    float qq = 0.f, kk = 0.f;
#pragma unroll 2
    for (int c = part; c < kPaddedK / 8; c += parts) {
      const int at = row * Tile<kPaddedK>::stride + c * 8;
      const Word4 qw = *reinterpret_cast<const Word4*>(q + at);
      const Word4 kw = *reinterpret_cast<const Word4*>(k + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float q0 = low_half<Config::Element>(qw.w[i]), q1 = high_half<Config::Element>(qw.w[i]);
        const float k0 = low_half<Config::Element>(kw.w[i]), k1 = high_half<Config::Element>(kw.w[i]);
        qq = fma(q1, q1, fma(q0, q0, qq));
        kk = fma(k1, k1, fma(k0, k0, kk));
      }
    }
#pragma unroll
    for (int mask = parts / 2; mask; mask >>= 1) {
      qq += shuffle_xor(qq, mask);
      kk += shuffle_xor(kk, mask);
    }
    if (part == 0) {
      q_factor[row] = scale * l2norm_factor(qq);
      k_factor[row] = l2norm_factor(kk);
    }
  }
}

} // namespace kda
