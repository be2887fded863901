#pragma once
// Shared memory of kda_backward_gradients (gradients.cuh), and what its parts have in common.
#include "chunk_backward/workspace.cuh"
#include "stages/decay.cuh"

namespace kda {

constexpr int kGradientWarps = Config::prepare_warps;
constexpr int kGradientThreads = kGradientWarps * 32;
using GradientMap = ChannelMap<kGradientThreads, kChunkTiles>;
/// Blocks of 16 channels that a warp owns.
constexpr int kWarpBlocks = (kKeyBlocks + kGradientWarps - 1) / kGradientWarps;
/// Of an fp32 table [C][kPaddedK]: half a warp reads 4 rows of 8 floats from all banks.
constexpr int kTableStride = kPaddedK + 8;

/// Shared memory, byte offsets.
struct GradientShared {
  static constexpr int C = Config::chunk;
  static constexpr int key_tile = Tile<kPaddedK>::bytes(C);
  static constexpr int table_bytes = C * kTableStride * 4;
  static constexpr int sums_bytes = kChunkTiles * kPaddedK * 4;
  static constexpr int row_q = 0;                   ///< q, then scale q 2^(G - anchor)
  static constexpr int row_k = row_q + key_tile;    ///< k, then beta k 2^(G - anchor)
  static constexpr int column_k = row_k + key_tile; ///< k 2^(anchor - G)
  /// Gates from the tile's start; then what S gives to dg.
  static constexpr int prefix = column_k + key_tile;
  /// Gates; then clamped ones from the anchor; then what goes to D.
  static constexpr int anchored = prefix + table_bytes;
  static constexpr int d_m = anchored + table_bytes;
  static constexpr int d_a = d_m + Tile<C>::bytes(C);
  static constexpr int values = d_a + Tile<C>::bytes(C);
  static constexpr int d_o = values;                       ///< Tile<kPaddedV>
  static constexpr int u = d_o + Tile<kPaddedV>::bytes(C); ///< A fragments [token tile][value block]
  static constexpr int r = u + kValuesBytes;               ///< the same
  static constexpr int values_end = r + kValuesBytes;
  static constexpr int pairs = values; ///< table: what pairs give to dg, when dO, U and R are dead
  static constexpr int pairs_end = pairs + table_bytes;
  static constexpr int total =
      values_end > pairs_end ? values_end : pairs_end; ///< GateSums, later sums of dg
  static constexpr int start = total + sums_bytes;
  static constexpr int anchor = start + sums_bytes;
  static constexpr int state_dot = anchor + sums_bytes; ///< [kPaddedK] 2^tot sum_v S D
  static constexpr int q_factor = state_dot + kPaddedK * 4;
  static constexpr int k_factor = q_factor + C * 4;
  static constexpr int beta = k_factor + C * 4;
  static constexpr int diagonal = beta + C * 4;     ///< dM_ii
  static constexpr int row_sums = diagonal + C * 4; ///< [4][warp][C]: dbeta from v, from k, q.dq, k.dk
  static constexpr int span = row_sums + 4 * kGradientWarps * C * 4;
  static constexpr int bytes = (span + 24 + 15) / 16 * 16;
  static constexpr int parameters = row_q; ///< [tile][kPaddedK] d dt_bias, [warp] d A_log, at the end
};
/// CTAs that share an SM. A warp holds 48 registers of accumulators for each 16x16 block of its channels.
constexpr int gradient_ctas() {
  constexpr int fit = 233472 / (GradientShared::bytes + 1024);
  constexpr int registers = 65536 / (kGradientThreads * (kWarpBlocks * kChunkTiles > 2 ? 256 : 128));
  constexpr int ctas = fit < registers ? fit : registers;
  return ctas < 1 ? 1 : ctas;
}

KDA_DEVICE GateSums gradient_sums() {
  return {shared_at<float>(GradientShared::total), shared_at<float>(GradientShared::start),
          shared_at<float>(GradientShared::anchor)};
}
KDA_DEVICE float* table_at(int offset, int row, int channel) {
  return shared_at<float>(offset) + row * kTableStride + channel;
}

/// Sums over channels or columns of V that a lane collects for its rows g and g + 8 of a tile.
struct RowSums {
  float x[2] = {};
};
KDA_DEVICE void write_row_sums(const RowSums& sums, int which, int tile) {
  float* out = shared_at<float>(GradientShared::row_sums) +
               (which * kGradientWarps + warp_index()) * Config::chunk + tile * kTileRows +
               (lane_index() >> 2);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float sum = sums.x[e];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if ((lane_index() & 3) == 0) out[e * 8] = sum;
  }
}
KDA_DEVICE float read_row_sum(int which, int row) {
  const float* in = shared_at<float>(GradientShared::row_sums) + which * kGradientWarps * Config::chunk + row;
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < kGradientWarps; ++warp)
    sum += in[warp * Config::chunk];
  return sum;
}

/// Elements of a 16x16 block as accumulators hold them, from a strided 16-bit tensor; 0 outside.
KDA_DEVICE void load_block(const Config::Element* p, i64 stride, int rows, int columns, float (&x)[2][4]) {
  const int row = lane_index() >> 2, column = (lane_index() & 3) * 2;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int r = row + e * 4, c = column + n * 8;
      u32 pair = 0;
      if (r < rows && c < columns) pair = *reinterpret_cast<const u32*>(p + r * stride + c);
      x[n][e] = low_half<Config::Element>(pair);
      x[n][e + 1] = high_half<Config::Element>(pair);
    }
}

} // namespace kda
