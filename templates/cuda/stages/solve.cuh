#pragma once
// X = (I + A)^-1 of a chunk, A = diag(beta) L strictly lower triangular, and T = X diag(beta) as an operand.
//
// Correlated keys make X large and its terms cancel, so diagonal tiles are inverted by substitution in fp32
// and merged with operands split into two bf16 (16 bits of mantissa; plain tf32 is not enough). Tiles at
// distance d from the diagonal follow from nearer ones:
//   X_ij = -X_ii sum_{j<=m<i} A_im X_mj
// Both products are formed transposed, because an accumulator then is the next product's A operand.
#include "stages/tile.cuh"

namespace kda {

/// One chunk's matrix in fp32, [Config::chunk][kSolveStride]: before, A_ij in tile (i, j), i > j, and A_ii
/// (zeros on and above its diagonal). After, X_ii in its tile and X_ij^T in tile (j, i). The stride keeps
/// 8-byte accesses of 4 rows in different banks.
constexpr int kSolveStride = Config::chunk + 8;
/// T^T: Tiles<Config::chunk> of the chunks one after the other, row j, column i holds X_ij beta_j; tiles i <
/// j are never read. `low` is what rounding to bf16 leaves in `high`, null where it is not wanted: rounding T
/// alone costs as much accuracy as rounding u.
struct TransposedT {
  Operand *high, *low;
  static constexpr int stride = Tile<Config::chunk>::stride;
  static constexpr int bytes(int rows) { return Tile<Config::chunk>::bytes(rows); }
  KDA_DEVICE TransposedT chunk(int row) const {
    return {high + row * stride, low == nullptr ? nullptr : low + row * stride};
  }
};

KDA_DEVICE int solve_place(int row_tile, int column_tile) {
  return (row_tile * kSolveStride + column_tile) * kTileRows;
}

/// Two numbers as a sum of two bf16 each: 16 bits of mantissa.
KDA_DEVICE void split_pair(float x, float y, u32& high, u32& low) {
  high = pack2<Operand>(x, y);
  low = pack2<Operand>(x - low_half<Operand>(high), y - high_half<Operand>(high));
}

/// One warp inverts A_ii in place. `beta` is that of the chunk's row 0.
KDA_DEVICE void invert_diagonal(float* matrix, int i, const float* beta, const TransposedT& t_transposed) {
  float* a = matrix + solve_place(i, i);
  const int column = lane_index() & 15;
  float x[kTileRows]; // of this lane's column; both halves of the warp do the same
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    x[r] = r == column ? 1.f : 0.f;
#pragma unroll
    for (int j = 0; j < r; j += 4) {
      const Word4 row = *reinterpret_cast<const Word4*>(a + r * kSolveStride + j);
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (j + n < r) x[r] = fma(-bits_float(row.w[n]), x[j + n], x[r]);
    }
  }
  sync_warp();
  if (lane_index() < kTileRows) {
    const float b = beta[i * kTileRows + column];
    const int place = (i * kTileRows + column) * TransposedT::stride + i * kTileRows;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r)
      a[r * kSolveStride + column] = x[r];
#pragma unroll
    for (int r = 0; r < kTileRows; r += 8) {
      Word4 high, low;
#pragma unroll
      for (int w = 0; w < 4; ++w)
        split_pair(x[r + 2 * w] * b, x[r + 2 * w + 1] * b, high.w[w], low.w[w]);
      *reinterpret_cast<Word4*>(t_transposed.high + place + r) = high;
      if (t_transposed.low != nullptr) *reinterpret_cast<Word4*>(t_transposed.low + place + r) = low;
    }
  }
}

/// A 16x16 operand as a sum of two bf16, in the order of A; as B its words are {0, 2, 1, 3}.
struct SplitOperand {
  u32 high[4], low[4];
  KDA_DEVICE void set(int word, float x, float y) { split_pair(x, y, high[word], low[word]); }
};
/// Element (row, column) of the operand is x[row * kSolveStride + column].
KDA_DEVICE SplitOperand load_split(const float* x) {
  const int row = lane_index() >> 2, column = (lane_index() & 3) * 2;
  SplitOperand s;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float* p = x + (row + (w & 1) * 8) * kSolveStride + column + (w >> 1) * 8;
    const Word2 pair = *reinterpret_cast<const Word2*>(p);
    s.set(w, bits_float(pair.w[0]), bits_float(pair.w[1]));
  }
  return s;
}
/// Element (row, column) of the operand is x[column * kSolveStride + row].
KDA_DEVICE SplitOperand load_split_transposed(const float* x) {
  const int row = lane_index() >> 2, column = (lane_index() & 3) * 2;
  SplitOperand s;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float* p = x + (column + (w >> 1) * 8) * kSolveStride + row + (w & 1) * 8;
    s.set(w, p[0], p[kSolveStride]);
  }
  return s;
}
/// c += a * b^T, a [M][K] and b [N][K]. The product of the low parts is below fp32's rounding.
KDA_DEVICE void multiply_split(Accumulator& c, const SplitOperand& a, const SplitOperand& b) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    mma_16x8x16<Operand>(c.d[n], a.low, b.high[n], b.high[n + 2]);
    mma_16x8x16<Operand>(c.d[n], a.high, b.low[n], b.low[n + 2]);
    mma_16x8x16<Operand>(c.d[n], a.high, b.high[n], b.high[n + 2]);
  }
}

/// One warp makes X_ij, i > j. Needs all nearer tiles of row i and column j, so a barrier between distances.
KDA_DEVICE void merge_tiles(float* matrix, int i, int j, const float* beta, const TransposedT& t_transposed) {
  Accumulator y; // (sum A_im X_mj)^T
  multiply_split(y, load_split_transposed(matrix + solve_place(j, j)),
                 load_split(matrix + solve_place(i, j)));
#pragma unroll 1
  for (int m = j + 1; m < i; ++m)
    multiply_split(y, load_split(matrix + solve_place(j, m)), load_split(matrix + solve_place(i, m)));
  SplitOperand a;
#pragma unroll
  for (int w = 0; w < 4; ++w)
    a.set(w, -y.d[w >> 1][(w & 1) * 2], -y.d[w >> 1][(w & 1) * 2 + 1]);
  Accumulator x; // X_ij^T
  multiply_split(x, a, load_split(matrix + solve_place(i, i)));
  const int row = lane_index() >> 2, column = (lane_index() & 3) * 2;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int r = row + (w & 1) * 8, c = column + (w >> 1) * 8;
    const float x0 = x.d[w >> 1][(w & 1) * 2], x1 = x.d[w >> 1][(w & 1) * 2 + 1];
    float* p = matrix + solve_place(j, i) + r * kSolveStride + c;
    *reinterpret_cast<Word2*>(p) = Word2{{float_bits(x0), float_bits(x1)}};
    const float b = beta[j * kTileRows + r];
    const int place = (j * kTileRows + r) * TransposedT::stride + i * kTileRows + c;
    u32 high, low;
    split_pair(x0 * b, x1 * b, high, low);
    *reinterpret_cast<u32*>(t_transposed.high + place) = high;
    if (t_transposed.low != nullptr) *reinterpret_cast<u32*>(t_transposed.low + place) = low;
  }
}

/// The A_ij of a tile pair from L: rows scaled by beta.
KDA_DEVICE void store_solve_tile(float* matrix, int i, int j, const Accumulator& l, const float* beta) {
  const int row = lane_index() >> 2, column = (lane_index() & 3) * 2;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int r = row + (w & 1) * 8, c = column + (w >> 1) * 8;
    const float b = beta[i * kTileRows + r];
    float* p = matrix + solve_place(i, j) + r * kSolveStride + c;
    *reinterpret_cast<Word2*>(p) =
        Word2{{float_bits(b * l.d[w >> 1][(w & 1) * 2]), float_bits(b * l.d[w >> 1][(w & 1) * 2 + 1])}};
  }
}

/// All warps of the CTA: X and T^T of its chunks, the matrices one after the other. A barrier
/// must stand before; the last thing it does is a barrier.
template <int warps, int chunks>
KDA_DEVICE void solve_chunks(float* matrix, const float* beta, const TransposedT& t_transposed) {
  constexpr int C = Config::chunk;
  for (int t = warp_index(); t < chunks * kChunkTiles; t += warps) {
    const int chunk = t / kChunkTiles;
    invert_diagonal(matrix + chunk * C * kSolveStride, t % kChunkTiles, beta + chunk * C,
                    t_transposed.chunk(chunk * C));
  }
  sync_block();
#pragma unroll 1
  for (int distance = 1; distance < kChunkTiles; ++distance) {
    const int count = kChunkTiles - distance;
    for (int t = warp_index(); t < chunks * count; t += warps) {
      const int chunk = t / count, j = t % count;
      merge_tiles(matrix + chunk * C * kSolveStride, j + distance, j, beta + chunk * C,
                  t_transposed.chunk(chunk * C));
    }
    sync_block();
  }
}

} // namespace kda
