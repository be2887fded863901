#pragma once
// The pair matrices of a chunk in 16x16 tiles (i, j), j <= i:
//   L_ij = sum_d k_id k_jd 2^(G_id - G_jd),  M_ij = scale sum_d q_id k_jd 2^(G_id - G_jd)
// from operands anchored at row kAnchorRow of their own tile: row_q = scale q 2^(G - anchor), row_k = k 2^(G
// - anchor), column_k = k 2^(anchor - G). Tiles off the diagonal multiply the column operand by the decay
// from anchor to anchor, which is <= 1.
#include "stages/decay.cuh"

namespace kda {

/// Tile pairs of a chunk, and the place of (i, j) among them.
constexpr int kChunkPairs = kChunkTiles * (kChunkTiles + 1) / 2;
KDA_DEVICE constexpr int pair_place(int i, int j) {
  return i * (i + 1) / 2 + j;
}

/// Tile pair number `task` of a CTA's `tiles` tiles, nearest pairs first. i and j count the CTA's tiles;
/// valid is false behind the last pair.
struct TilePair {
  int i, j;
  bool valid;
};
template <int tiles>
KDA_DEVICE TilePair find_pair(int task) {
  constexpr int chunks = tiles / kChunkTiles;
#pragma unroll
  for (int distance = 0; distance < kChunkTiles; ++distance) {
    const int count = chunks * (kChunkTiles - distance);
    if (task < count) {
      const int j = task / (kChunkTiles - distance) * kChunkTiles + task % (kChunkTiles - distance);
      return {j + distance, j, true};
    }
    task -= count;
  }
  return {0, 0, false};
}

/// 2 to the clamped gates from the anchor of tile j to that of tile i > j, for 2 channels from `channel` on,
/// in two factors: up to the start of tile i and from there. Their product may underflow where the product
/// with a column operand (up to 2^95) does not.
struct AnchorDecay {
  float before[2], within[2];
};
KDA_DEVICE AnchorDecay anchor_decay(const GateSums& sums, int i, int j, int channel) {
  float start[2], from[2], to[2];
  load_elements(sums.start + i * kPaddedK + channel, start);
  load_elements(sums.anchor + j * kPaddedK + channel, from);
  load_elements(sums.anchor + i * kPaddedK + channel, to);
  AnchorDecay decay;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    decay.before[e] = exp2_fast(start[e] - from[e]);
    decay.within[e] = exp2_fast(to[e] - start[e]);
  }
  return decay;
}
KDA_DEVICE u32 scale_operands(u32 pair, const AnchorDecay& decay) {
  return pack2<Operand>(low_half<Operand>(pair) * decay.before[0] * decay.within[0],
                        high_half<Operand>(pair) * decay.before[1] * decay.within[1]);
}

/// One warp: L and M of the tile pair, unmasked: entries above the diagonal may be anything, infinite or NaN
/// included.
KDA_DEVICE void multiply_pair(const TilePair& pair, const Operand* row_q, const Operand* row_k,
                              const Operand* column_k, const GateSums& sums, Accumulator& l, Accumulator& m) {
  const int lane_channel = (lane_index() & 3) * 2;
#pragma unroll 2
  for (int c = 0; c < kPaddedK; c += 16) {
    u32 q[4], k[4], b[4];
    load_a<kPaddedK>(q, row_q, pair.i * kTileRows, c);
    load_a<kPaddedK>(k, row_k, pair.i * kTileRows, c);
    load_b<kPaddedK>(b, column_k, pair.j * kTileRows, c);
    if (pair.i != pair.j) {
      const AnchorDecay low = anchor_decay(sums, pair.i, pair.j, c + lane_channel);
      const AnchorDecay high = anchor_decay(sums, pair.i, pair.j, c + 8 + lane_channel);
      b[0] = scale_operands(b[0], low);
      b[1] = scale_operands(b[1], high);
      b[2] = scale_operands(b[2], low);
      b[3] = scale_operands(b[3], high);
    }
    multiply_add(l, k, b);
    multiply_add(m, q, b);
  }
}

/// Keeps row >= column (or row > column) of a diagonal tile. By selection: the rest may be NaN.
KDA_DEVICE void mask_diagonal(Accumulator& c, bool strictly) {
  const int row = lane_index() >> 2, column = (lane_index() & 3) * 2;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int distance = row + (e >> 1) * 8 - (column + n * 8 + (e & 1));
      c.d[n][e] = distance > 0 || (distance == 0 && !strictly) ? c.d[n][e] : 0.f;
    }
}

} // namespace kda
