#pragma once
// 16-bit matrices in shared memory and their mma fragments.
//
// A Tile<columns> is row-major with 8 elements of padding a row: an odd number of 16-byte pieces, so the 8
// rows that ldmatrix reads together lie in 8 different bank groups, whatever K and V are. Operands of the
// tensor unit are bf16 for every 16-bit dtype: decays and the state leave fp16's range.
#include "config.cuh"
#include "primitives/matrix.cuh"

namespace kda {

using Operand = bf16;

/// Rows of a tile of tokens: M of mma, and the K of a product over tokens.
constexpr int kTileRows = 16;
constexpr int kPaddedK = (Config::K + 15) / 16 * 16;
constexpr int kPaddedV = (Config::V + 15) / 16 * 16;
/// Tiles of a chunk.
constexpr int kChunkTiles = Config::chunk / kTileRows;

/// What lies `offset` bytes into the CTA's shared memory.
template <class T>
KDA_DEVICE T* shared_at(int offset) {
  return reinterpret_cast<T*>(shared_memory() + offset);
}

template <int columns>
struct Tile {
  static constexpr int stride = columns + 8;
  static constexpr int bytes(int rows) { return rows * stride * 2; }
};

/// The same without padding, for what is copied as it lies: the 16-byte pieces of a row change places by
/// XOR with a number that depends on the row, just enough to spread 8 rows over all bank groups.
template <int columns>
struct SwizzledTile {
  static constexpr int pieces = columns / 8; // even
  static constexpr int spread = pieces % 8 == 0 ? 8 : pieces % 4 == 0 ? 4 : 2;
  static constexpr int bytes(int rows) { return rows * columns * 2; }
  /// Element (row, column); columns of one piece stay neighbours.
  KDA_DEVICE static int place(int row, int column) {
    return row * columns + (((column >> 3) ^ (row / (8 / spread) & (spread - 1))) << 3) + (column & 7);
  }
};

/// A (16 rows of M, 16 of K) at (row, column) of a matrix stored [M][K].
template <int columns>
KDA_DEVICE void load_a(u32 (&a)[4], const Operand* x, int row, int column) {
  const int lane = lane_index();
  load_matrix_x4(a, x + (row + (lane & 15)) * Tile<columns>::stride + column + (lane >> 4) * 8);
}
/// A (16 of M, 16 of K) at (k, m) of a matrix stored [K][M].
template <int columns>
KDA_DEVICE void load_a_transposed(u32 (&a)[4], const Operand* x, int k, int m) {
  const int lane = lane_index();
  load_matrix_x4_transposed(a, x + (k + (lane & 7) + (lane >> 4) * 8) * Tile<columns>::stride + m +
                                   (lane >> 3 & 1) * 8);
}
/// B (16 of K, 16 of N) at (n, k) of a matrix stored [N][K]: b[0], b[1] for the first 8 columns of N, b[2],
/// b[3] for the others.
template <int columns>
KDA_DEVICE void load_b(u32 (&b)[4], const Operand* x, int n, int k) {
  const int lane = lane_index();
  load_matrix_x4(b, x + (n + (lane & 7) + (lane >> 4) * 8) * Tile<columns>::stride + k + (lane >> 3 & 1) * 8);
}
/// The same at (k, n) of a matrix stored [K][N].
template <int columns>
KDA_DEVICE void load_b_transposed(u32 (&b)[4], const Operand* x, int k, int n) {
  const int lane = lane_index();
  load_matrix_x4_transposed(b, x + (k + (lane & 15)) * Tile<columns>::stride + n + (lane >> 4) * 8);
}

template <int columns>
KDA_DEVICE void load_a_swizzled(u32 (&a)[4], const Operand* x, int row, int column) {
  const int lane = lane_index();
  load_matrix_x4(a, x + SwizzledTile<columns>::place(row + (lane & 15), column + (lane >> 4) * 8));
}
template <int columns>
KDA_DEVICE void load_b_swizzled(u32 (&b)[4], const Operand* x, int n, int k) {
  const int lane = lane_index();
  load_matrix_x4(b,
                 x + SwizzledTile<columns>::place(n + (lane & 7) + (lane >> 4) * 8, k + (lane >> 3 & 1) * 8));
}
template <int columns>
KDA_DEVICE void load_b_transposed_swizzled(u32 (&b)[4], const Operand* x, int k, int n) {
  const int lane = lane_index();
  load_matrix_x4_transposed(b, x + SwizzledTile<columns>::place(k + (lane & 15), n + (lane >> 4) * 8));
}

/// 16x16 accumulators: d[n] holds columns 8n..8n+7.
struct Accumulator {
  float d[2][4] = {};
};
KDA_DEVICE void multiply_add(Accumulator& c, const u32 (&a)[4], const u32 (&b)[4]) {
  mma_16x8x16<Operand>(c.d[0], a, b[0], b[1]);
  mma_16x8x16<Operand>(c.d[1], a, b[2], b[3]);
}
/// The accumulators as an A operand whose K is the accumulator's N. The same words are, in the order {0, 2,
/// 1, 3}, the B operand of the transposed product (N = the accumulator's M).
KDA_DEVICE Word4 pack_a(const Accumulator& c) {
  return Word4{{pack2<Operand>(c.d[0][0], c.d[0][1]), pack2<Operand>(c.d[0][2], c.d[0][3]),
                pack2<Operand>(c.d[1][0], c.d[1][1]), pack2<Operand>(c.d[1][2], c.d[1][3])}};
}

/// Two elements of a tensor as an operand.
template <class T>
KDA_DEVICE u32 as_operand(u32 pair) {
  return pack2<Operand>(low_half<T>(pair), high_half<T>(pair));
}
template <>
KDA_DEVICE u32 as_operand<Operand>(u32 pair) {
  return pair;
}

/// Transposes 4 words of 4 neighbouring lanes: word i of lane t goes to word t of lane i.
KDA_DEVICE void transpose_quad(Word4& x) {
  const bool odd = lane_index() & 1, upper = lane_index() & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 received = shuffle_xor(odd ? x.w[i] : x.w[i + 1], 1);
    x.w[i] = odd ? received : x.w[i];
    x.w[i + 1] = odd ? x.w[i + 1] : received;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 received = shuffle_xor(upper ? x.w[i] : x.w[i + 2], 2);
    x.w[i] = upper ? received : x.w[i];
    x.w[i + 2] = upper ? x.w[i + 2] : received;
  }
}

/// 16x16 accumulators rounded to T, for store_rows.
template <class T>
KDA_DEVICE Word4 pack_rows(const Accumulator& x) {
  Word4 words;
#pragma unroll
  for (int w = 0; w < 4; ++w) // row half w/2, column half w%2
    words.w[w] = pack2<T>(x.d[w & 1][w & 2], x.d[w & 1][(w & 2) + 1]);
  return words;
}
/// Stores them to rows of `dim` elements; `p` is at the first row and column, `rows` and `columns` what
/// exists from there.
template <int dim, class T>
KDA_DEVICE void store_rows(T* p, i64 stride, Word4 words, int rows, int columns) {
  const int row = lane_index() >> 2, t = lane_index() & 3;
  if constexpr (dim % 8 == 0) {
    // Whole 32-byte sectors: a lane gets 8 columns of one token.
    transpose_quad(words);
    const int r = row + (t >> 1) * 8, c = (t & 1) * 8;
    if (r < rows && c < columns) *reinterpret_cast<Word4*>(p + r * stride + c) = words;
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int r = row + (w >> 1) * 8, c = (w & 1) * 8 + t * 2;
      if (r < rows && c < columns) *reinterpret_cast<u32*>(p + r * stride + c) = words.w[w];
    }
  }
}

} // namespace kda
