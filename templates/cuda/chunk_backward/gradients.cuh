#pragma once
// Chunk-parallel last part of the backward: from S, D, U, dU (workspace.cuh) and the inputs of one chunk of
// one value head to its gradients.
//
// With A = diag(beta) L, X = (I + A)^-1 and the U of chunk_backward/scan.cuh, (I + A) U = diag(beta) (v -
// k 2^G S), so that R = X^T dU is the gradient of the right side and
//   dv = beta R,   dA = -R U^T,   dM = dO U^T  (lower triangles)
//   d(scale q) = 2^G (dO S^T) + sum_j dM_ij k_j 2^(G_i - G_j)
//   dk = 2^(tot - G) (U D^T) + beta (-2^G (R S^T) + sum_j dL_ij k_j 2^(G_i - G_j))
//        + sum_i (dM_ij scale q_i + dL_ij beta_i k_i) 2^(G_i - G_j)          with dA = beta dL
// dg_t adds up every product whose decay contains token t: those from S to tokens >= t, from tokens < t to D,
// from S to D, and pairs i >= t > j. Pairs with both ends >= t must cancel: each pair's two shares are made
// of the same rounded numbers, and pairs i = j, which do not decay, are kept out of the pair products. The
// pair sum is scaled by what the clamp at kPairGateFloor took from token t itself.
//
// Budget at K = V = 128, bf16, C = 64, 8 warps: reads 2.8 KB and writes 1 KB a token and head, 205 KB of
// shared memory, 1,152 mma.sync a warp.
#include "chunk_backward/workspace.cuh"
#include "stages/decay.cuh"
#include "stages/pair.cuh"

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
  static constexpr int d_l = d_m + Tile<C>::bytes(C); ///< dA
  static constexpr int values = d_l + Tile<C>::bytes(C);
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

/// One warp: U and R = X^T dU of 16 columns of V as operands, dv, and R's share of dbeta.
KDA_DEVICE void load_values(const KernelArgs& args, const ChunkSpan& span, i64 chunk, int head, int block,
                            RowSums (&d_beta)[kChunkTiles]) {
  const unsigned char* const u = chunk_slot<4>(args, chunk, head);
  const unsigned char* const d_u = chunk_slot<5>(args, chunk, head);
  const unsigned char* const x = record_of(args, chunk, head) + Record::x;
  const float* beta = shared_at<float>(GradientShared::beta) + (lane_index() >> 2);
  Accumulator r[kChunkTiles];
#pragma unroll
  for (int j = 0; j < kChunkTiles; ++j) {
    const Word4 b = *fragment(d_u, (block * kChunkTiles + j) * 2);
    const Word4 b_rest = *fragment(d_u, (block * kChunkTiles + j) * 2 + 1);
#pragma unroll
    for (int i = 0; i <= j; ++i)
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const Word4 a = *fragment(x, 2 * pair_place(j, i) + part);
        mma_16x8x16<Operand>(r[i].d[0], a.w, b.w[0], b.w[2]);
        mma_16x8x16<Operand>(r[i].d[1], a.w, b.w[1], b.w[3]);
        if (part != 0) continue;
        mma_16x8x16<Operand>(r[i].d[0], a.w, b_rest.w[0], b_rest.w[2]);
        mma_16x8x16<Operand>(r[i].d[1], a.w, b_rest.w[1], b_rest.w[3]);
      }
    const Word4 w = *fragment(u, block * kChunkTiles + j);
    *fragment(shared_at<unsigned char>(GradientShared::u), j * kValueBlocks + block) =
        Word4{{transpose_matrix(w.w[0]), transpose_matrix(w.w[2]), transpose_matrix(w.w[1]),
               transpose_matrix(w.w[3])}};
  }
#pragma unroll
  for (int i = 0; i < kChunkTiles; ++i) {
    *fragment(shared_at<unsigned char>(GradientShared::r), i * kValueBlocks + block) = pack_a(r[i]);
    const i64 first = span.first + i * kTileRows;
    const int rows = span.rows - i * kTileRows, columns = Config::V - block * 16;
    float v[2][4];
    load_block(row_of<const Config::Element>(args.v, span.batch, first, head) + block * 16,
               args.v.stride_token, rows, columns, v);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        d_beta[i].x[e >> 1] = fma(r[i].d[n][e], v[n][e], d_beta[i].x[e >> 1]);
        r[i].d[n][e] *= beta[i * kTileRows + (e >> 1) * 8];
      }
    store_rows<Config::V>(row_of<Config::Element>(args.d_v, span.batch, first, head) + block * 16,
                          args.d_v.stride_token, pack_rows<Config::Element>(r[i]), rows, columns);
  }
}

/// dM and dL's share of dA without beta, below the diagonal, as operands; dM_ii apart.
KDA_DEVICE void write_pair_gradients(int task) {
  const TilePair pair = find_pair<kChunkTiles>(task);
  Accumulator m, l;
#pragma unroll 2
  for (int b = 0; b < kValueBlocks; ++b) {
    u32 o[4];
    load_a<kPaddedV>(o, shared_at<Operand>(GradientShared::d_o), pair.i * kTileRows, b * 16);
#pragma unroll
    for (int w = 0; w < 4; ++w)
      o[w] = as_operand<Config::Element>(o[w]);
    const Word4 r = *fragment(shared_at<const unsigned char>(GradientShared::r), pair.i * kValueBlocks + b);
    const Word4 u = *fragment(shared_at<const unsigned char>(GradientShared::u), pair.j * kValueBlocks + b);
    const u32 columns[4] = {u.w[0], u.w[2], u.w[1], u.w[3]};
    multiply_add(m, o, columns);
    multiply_add(l, r.w, columns);
  }
  const int row = lane_index() >> 2, column = (lane_index() & 3) * 2;
  if (pair.i == pair.j) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (row + (e >> 1) * 8 == column + n * 8 + (e & 1))
          shared_at<float>(GradientShared::diagonal)[pair.i * kTileRows + row + (e >> 1) * 8] = m.d[n][e];
    mask_diagonal(m, true);
    mask_diagonal(l, true);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int at = (pair.i * kTileRows + row + e * 4) * Tile<Config::chunk>::stride + pair.j * kTileRows +
                     column + n * 8;
      *reinterpret_cast<u32*>(shared_at<Operand>(GradientShared::d_m) + at) =
          pack2<Operand>(m.d[n][e], m.d[n][e + 1]);
      *reinterpret_cast<u32*>(shared_at<Operand>(GradientShared::d_l) + at) =
          pack2<Operand>(-l.d[n][e], -l.d[n][e + 1]);
    }
}

/// Operands of the pair products over the raw q and k, and the tables of decays.
KDA_DEVICE void write_pair_operands(const KernelArgs& args, const GradientMap& map) {
  constexpr int width = GradientMap::width, stride = Tile<kPaddedK>::stride;
  const int first = map.tile * kTileRows, place = first * stride + map.channel;
  const float* q_factor = shared_at<float>(GradientShared::q_factor) + first;
  const float* k_factor = shared_at<float>(GradientShared::k_factor) + first;
  const float* beta = shared_at<float>(GradientShared::beta) + first;
  Operand* row_q = shared_at<Operand>(GradientShared::row_q) + place;
  Operand* row_k = shared_at<Operand>(GradientShared::row_k) + place;
  Operand* column_k = shared_at<Operand>(GradientShared::column_k) + place;
  const GateSums sums = gradient_sums();
  float sum[width] = {}, anchored[width];
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const int at = map.tile * kPaddedK + map.channel + i;
    anchored[i] = sums.start[at] - sums.anchor[at];
  }
#pragma unroll 4
  for (int r = 0; r < kTileRows; ++r) {
    float q[width], k[width], x[width];
    load_elements(reinterpret_cast<const Config::Element*>(row_q + r * stride), q);
    load_elements(reinterpret_cast<const Config::Element*>(row_k + r * stride), k);
    float gates[width];
    load_elements(table_at(GradientShared::anchored, first + r, map.channel), gates);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      sum[i] += gates[i];
      anchored[i] += max(gates[i], kPairGateFloor);
      const float grown = exp2_fast(anchored[i]);
      k[i] *= k_factor[r];
      q[i] *= args.scale * q_factor[r] * grown;
      x[i] = k[i] * exp2_fast(-anchored[i]);
      k[i] *= beta[r] * grown;
    }
    store_elements(table_at(GradientShared::prefix, first + r, map.channel), sum);
    store_elements(table_at(GradientShared::anchored, first + r, map.channel), anchored);
    store_elements(row_q + r * stride, q);
    store_elements(row_k + r * stride, k);
    store_elements(column_k + r * stride, x);
  }
}

/// Gradients of one block of 16 channels: first products with S and D, before decays; then dq and dk.
struct BlockGradients {
  Accumulator q[kChunkTiles], p[kChunkTiles], k[kChunkTiles];
};

/// q = dO S^T, p = R S^T, k = U D^T.
KDA_DEVICE void multiply_states(const KernelArgs& args, i64 chunk, int head, int block,
                                BlockGradients& gradients) {
  const unsigned char* const state = chunk_slot<2>(args, chunk, head);
  const unsigned char* const d_state = chunk_slot<3>(args, chunk, head);
  float dot[4] = {}; // of channels 2t, 2t+1, 2t+8, 2t+9
#pragma unroll 2
  for (int b = 0; b < kValueBlocks; ++b) {
    const Word4 s = *fragment(state, b * kKeyBlocks + block), d = *fragment(d_state, b * kKeyBlocks + block);
    u32 s_columns[4], d_columns[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float* sum = dot + (w >> 1) * 2;
      sum[0] = fma(low_half<Operand>(s.w[w]), low_half<Operand>(d.w[w]), sum[0]);
      sum[1] = fma(high_half<Operand>(s.w[w]), high_half<Operand>(d.w[w]), sum[1]);
      s_columns[w] = transpose_matrix(s.w[w]);
      d_columns[w] = transpose_matrix(d.w[w]);
    }
#pragma unroll
    for (int i = 0; i < kChunkTiles; ++i) {
      u32 o[4];
      load_a<kPaddedV>(o, shared_at<Operand>(GradientShared::d_o), i * kTileRows, b * 16);
#pragma unroll
      for (int w = 0; w < 4; ++w)
        o[w] = as_operand<Config::Element>(o[w]);
      const Word4 r = *fragment(shared_at<const unsigned char>(GradientShared::r), i * kValueBlocks + b);
      const Word4 u = *fragment(shared_at<const unsigned char>(GradientShared::u), i * kValueBlocks + b);
      multiply_add(gradients.q[i], o, s_columns);
      multiply_add(gradients.p[i], r.w, s_columns);
      multiply_add(gradients.k[i], u.w, d_columns);
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2)
      dot[c] += shuffle_xor(dot[c], mask);
    const int channel = block * 16 + (c >> 1) * 8 + (lane_index() & 3) * 2 + (c & 1);
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kChunkTiles; ++i)
      total += gradient_sums().total[i * kPaddedK + channel];
    if (lane_index() < 4) shared_at<float>(GradientShared::state_dot)[channel] = dot[c] * exp2_fast(total);
  }
}

/// Multiplies sums anchored at tile `tile` - 1 by the decay to the anchor of `tile`, or the other way round.
/// In two factors, see AnchorDecay.
template <bool backwards>
KDA_DEVICE void move_anchor(Accumulator& x, int tile, int channel) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const AnchorDecay decay = anchor_decay(gradient_sums(), tile, tile - 1, channel + n * 8);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if constexpr (backwards)
        x.d[n][e] = x.d[n][e] * decay.within[e & 1] * decay.before[e & 1];
      else
        x.d[n][e] = x.d[n][e] * decay.before[e & 1] * decay.within[e & 1];
  }
}

/// Sums over the pairs of token tile `tile`, without its own decay: q = sum_j dM_ij column_k_j,
/// l = sum_j dL_ij column_k_j, k = sum_i dM_ij row_q_i + dL_ij row_k_i.
struct PairSums {
  Accumulator q, l, k;
};
KDA_DEVICE PairSums multiply_pairs(int tile, int block) {
  const Operand* d_m = shared_at<Operand>(GradientShared::d_m);
  const Operand* d_l = shared_at<Operand>(GradientShared::d_l);
  const int lane_channel = block * 16 + (lane_index() & 3) * 2;
  PairSums sums;
#pragma unroll
  for (int j = 0; j < kChunkTiles; ++j) {
    if (j > tile) break;
    if (j > 0) {
      move_anchor<false>(sums.q, j, lane_channel);
      move_anchor<false>(sums.l, j, lane_channel);
    }
    u32 a[4], b[4];
    load_b_transposed<kPaddedK>(b, shared_at<Operand>(GradientShared::column_k), j * kTileRows, block * 16);
    load_a<Config::chunk>(a, d_m, tile * kTileRows, j * kTileRows);
    multiply_add(sums.q, a, b);
    load_a<Config::chunk>(a, d_l, tile * kTileRows, j * kTileRows);
    multiply_add(sums.l, a, b);
  }
#pragma unroll
  for (int i = kChunkTiles - 1; i >= 0; --i) {
    if (i < tile) break;
    if (i < kChunkTiles - 1) move_anchor<true>(sums.k, i + 1, lane_channel);
    u32 a[4], b[4];
    load_a_transposed<Config::chunk>(a, d_m, i * kTileRows, tile * kTileRows);
    load_b_transposed<kPaddedK>(b, shared_at<Operand>(GradientShared::row_q), i * kTileRows, block * 16);
    multiply_add(sums.k, a, b);
    load_a_transposed<Config::chunk>(a, d_l, i * kTileRows, tile * kTileRows);
    load_b_transposed<kPaddedK>(b, shared_at<Operand>(GradientShared::row_k), i * kTileRows, block * 16);
    multiply_add(sums.k, a, b);
  }
  return sums;
}

/// Of one tile: what k gives to dbeta, and q.dq and k.dk of the normalised rows.
struct WarpSums {
  RowSums beta, q, k;
};

/// Raw q and k of a block of 16 tokens and 16 channels.
struct RawBlock {
  float q[2][4], k[2][4];
};
KDA_DEVICE RawBlock load_raw_block(const KernelArgs& args, const ChunkSpan& span, int head, int tile,
                                   int block) {
  const i64 first = span.first + tile * kTileRows, key_head = head / Config::group;
  const int rows = span.rows - tile * kTileRows, columns = Config::K - block * 16;
  RawBlock raw;
  load_block(row_of<const Config::Element>(args.q, span.batch, first, key_head) + block * 16,
             args.q.stride_token, rows, columns, raw.q);
  load_block(row_of<const Config::Element>(args.k, span.batch, first, key_head) + block * 16,
             args.k.stride_token, rows, columns, raw.k);
  return raw;
}

/// Two neighbouring operands of a key tile.
struct OperandPair {
  float x[2];
};
KDA_DEVICE OperandPair operands_at(int tile, int row, int channel) {
  const u32 pair =
      *reinterpret_cast<const u32*>(shared_at<Operand>(tile) + row * Tile<kPaddedK>::stride + channel);
  return {{low_half<Operand>(pair), high_half<Operand>(pair)}};
}

/// Decays, adds the pairs, and leaves dq (of scale q normalised), dk (of k normalised) and dg's parts.
KDA_DEVICE void combine(const KernelArgs& args, const ChunkSpan& span, int head, int tile, int block,
                        BlockGradients& gradients, WarpSums& warp) {
  const PairSums pairs = multiply_pairs(tile, block);
  const RawBlock raw = load_raw_block(args, span, head, tile, block);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int channel = block * 16 + n * 8 + (lane_index() & 3) * 2;
    float total[2], before[2] = {}, after[2] = {};
    load_elements(gradient_sums().total + tile * kPaddedK + channel, total);
    sum_other_tiles<false>(gradient_sums(), tile, channel, before);
    sum_other_tiles<true>(gradient_sums(), tile, channel, after);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * kTileRows + (lane_index() >> 2) + half * 8;
      const float beta = shared_at<float>(GradientShared::beta)[row];
      const float d_m = shared_at<float>(GradientShared::diagonal)[row];
      const float q_factor = shared_at<float>(GradientShared::q_factor)[row];
      const float k_factor = shared_at<float>(GradientShared::k_factor)[row];
      const OperandPair row_q = operands_at(GradientShared::row_q, row, channel);
      const OperandPair row_k = operands_at(GradientShared::row_k, row, channel);
      const OperandPair column_k = operands_at(GradientShared::column_k, row, channel);
      float prefix[2], anchored[2], from_start[2], to_end[2], crossing[2];
      load_elements(table_at(GradientShared::prefix, row, channel), prefix);
      load_elements(table_at(GradientShared::anchored, row, channel), anchored);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int e = half * 2 + i;
        const float yq = raw.q[n][e] * q_factor, k = raw.k[n][e] * k_factor, q = args.scale * yq;
        const float grown = exp2_fast(anchored[i]), shrunk = exp2_fast(-anchored[i]);
        const float decay = exp2_fast(prefix[i] + before[i]);
        const float q_state = gradients.q[tile].d[n][e] * decay;
        const float k_state = gradients.p[tile].d[n][e] * -decay;
        const float k_end = gradients.k[tile].d[n][e] * exp2_fast(total[i] - prefix[i] + after[i]);
        const float k_row = fma(pairs.l.d[n][e], grown, k_state); // without beta
        const float dq = fma(d_m, k, fma(pairs.q.d[n][e], grown, q_state));
        const float dk = fma(d_m, q, fma(pairs.k.d[n][e], shrunk, fma(beta, k_row, k_end)));
        from_start[i] = fma(q, q_state, beta * k * k_state);
        to_end[i] = k * k_end;
        crossing[i] = fma(row_q.x[i], pairs.q.d[n][e],
                          fma(row_k.x[i], pairs.l.d[n][e], -column_k.x[i] * pairs.k.d[n][e]));
        warp.beta.x[half] = fma(k, k_row, warp.beta.x[half]);
        warp.q.x[half] = fma(yq, dq, warp.q.x[half]);
        warp.k.x[half] = fma(k, dk, warp.k.x[half]);
        gradients.q[tile].d[n][e] = dq;
        gradients.k[tile].d[n][e] = dk;
      }
      store_elements(table_at(GradientShared::prefix, row, channel), from_start);
      store_elements(table_at(GradientShared::anchored, row, channel), to_end);
      store_elements(table_at(GradientShared::pairs, row, channel), crossing);
    }
  }
}

/// A value head's part of dq or dk, summed over the group by kda_backward_group.
KDA_DEVICE void store_part(float* p, const Accumulator& x, int rows, int columns) {
  const i64 stride = i64(Config::K);
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int r = (lane_index() >> 2) + e * 4, c = n * 8 + (lane_index() & 3) * 2;
      if (r < rows && c < columns)
        *reinterpret_cast<Word2*>(p + r * stride + c) =
            Word2{{float_bits(x.d[n][e]), float_bits(x.d[n][e + 1])}};
    }
}

/// dq and dk through the norm, to the caller or, for grouped heads, to the workspace.
KDA_DEVICE void store_key_gradients(const KernelArgs& args, const ChunkSpan& span, int head, int tile,
                                    int block, BlockGradients& gradients) {
  Accumulator& q = gradients.q[tile];
  Accumulator& k = gradients.k[tile];
  RawBlock raw;
  if constexpr (Config::qk_l2norm) raw = load_raw_block(args, span, head, tile, block);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile * kTileRows + (lane_index() >> 2) + half * 8;
    const float q_factor = shared_at<float>(GradientShared::q_factor)[row];
    const float k_factor = shared_at<float>(GradientShared::k_factor)[row];
    const float q_dot = Config::qk_l2norm ? read_row_sum(2, row) : 0.f;
    const float k_dot = Config::qk_l2norm ? read_row_sum(3, row) : 0.f;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = half * 2; e < half * 2 + 2; ++e) {
        if constexpr (Config::qk_l2norm) {
          q.d[n][e] = fma(-raw.q[n][e] * q_factor, q_dot, q.d[n][e]);
          k.d[n][e] = fma(-raw.k[n][e] * k_factor, k_dot, k.d[n][e]);
        }
        q.d[n][e] *= args.scale * q_factor;
        k.d[n][e] *= k_factor;
      }
  }
  const i64 first = span.first + tile * kTileRows;
  const int rows = span.rows - tile * kTileRows, columns = Config::K - block * 16;
  if constexpr (Config::group == 1) {
    store_rows<Config::K>(row_of<Config::Element>(args.d_q, span.batch, first, head) + block * 16,
                          args.d_q.stride_token, pack_rows<Config::Element>(q), rows, columns);
    store_rows<Config::K>(row_of<Config::Element>(args.d_k, span.batch, first, head) + block * 16,
                          args.d_k.stride_token, pack_rows<Config::Element>(k), rows, columns);
  } else {
    const i64 at = ((span.batch * args.value_heads + head) * args.tokens + first) * Config::K + block * 16;
    store_part(static_cast<float*>(args.workspace[8]) + at, q, rows, columns);
    store_part(static_cast<float*>(args.workspace[9]) + at, k, rows, columns);
  }
}

KDA_DEVICE void store_beta_gradients(const KernelArgs& args, const ChunkSpan& span, int head) {
  for (int row = thread_index(); row < span.rows; row += kGradientThreads) {
    const float raw = to_float(*row_of<const Config::Beta>(args.beta, span.batch, span.first + row, head));
    *row_of<Config::Beta>(args.d_beta, span.batch, span.first + row, head) =
        from_float<Config::Beta>((read_row_sum(0, row) + read_row_sum(1, row)) * beta_derivative(raw));
  }
}

/// The sums over its 16 rows of the three tables that dg is made of, in place of the sums of gates.
KDA_DEVICE void sum_tile_tables(const GradientMap& map) {
  constexpr int width = GradientMap::width;
  if (!map.active) return;
  const GateSums sums = gradient_sums();
  float from_start[width] = {}, to_end[width] = {}, crossing[width] = {};
#pragma unroll 4
  for (int r = 0; r < kTileRows; ++r) {
    const int row = map.tile * kTileRows + r;
    float x[3][width];
    load_elements(table_at(GradientShared::prefix, row, map.channel), x[0]);
    load_elements(table_at(GradientShared::anchored, row, map.channel), x[1]);
    load_elements(table_at(GradientShared::pairs, row, map.channel), x[2]);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      from_start[i] += x[0][i];
      to_end[i] += x[1][i];
      crossing[i] += x[2][i];
    }
  }
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const int at = map.tile * kPaddedK + map.channel + i;
    sums.total[at] = from_start[i];
    sums.start[at] = to_end[i];
    sums.anchor[at] = crossing[i];
  }
}

/// dg of this thread's channels of its tile through the gate, and its share of d dt_bias and d A_log.
KDA_DEVICE void write_gate_gradients(const KernelArgs& args, const ChunkSpan& span, int head,
                                     const GradientMap& map) {
  constexpr int width = GradientMap::width;
  float d_bias[width] = {}, d_a = 0.f;
  if (map.active && map.channel < Config::K) {
    const GateSums sums = gradient_sums();
    float from_start[width] = {}, to_end[width] = {}, crossing[width] = {}, bias[width] = {}, state[width];
    sum_other_tiles<true>({sums.total, nullptr, nullptr}, map.tile, map.channel, from_start);
    sum_other_tiles<false>({sums.start, nullptr, nullptr}, map.tile, map.channel, to_end);
    sum_other_tiles<true>({sums.anchor, nullptr, nullptr}, map.tile, map.channel, crossing);
    load_elements(shared_at<float>(GradientShared::state_dot) + map.channel, state);
    if constexpr (Config::dt_bias)
      load_elements<float, width>(args.dt_bias + i64(head) * Config::K + map.channel, bias);
    const float a = kReadsA ? exp_clamped(args.A_log[head]) : 1.f;
    const int first = map.tile * kTileRows;
#pragma unroll 4
    for (int r = 0; r < kTileRows; ++r) { // sums over the tokens before
      float* at = table_at(GradientShared::anchored, first + r, map.channel);
      float own[width];
      load_elements(at, own);
      store_elements(at, to_end);
#pragma unroll
      for (int i = 0; i < width; ++i)
        to_end[i] += own[i];
    }
    const auto* g = row_of<const Config::Gate>(args.g, span.batch, span.first + first, head) + map.channel;
    auto* d_g = row_of<Config::Gate>(args.d_g, span.batch, span.first + first, head) + map.channel;
#pragma unroll 4
    for (int r = kTileRows - 1; r >= 0; --r) {
      if (first + r >= span.rows) continue; // such rows hold zeros
      float x[width], own[3][width];
      load_elements(g + r * args.g.stride_token, x);
      load_elements(table_at(GradientShared::prefix, first + r, map.channel), own[0]);
      load_elements(table_at(GradientShared::anchored, first + r, map.channel), own[1]);
      load_elements(table_at(GradientShared::pairs, first + r, map.channel), own[2]);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        from_start[i] += own[0][i];
        crossing[i] += own[2][i];
        const float gate = gate_log2(x[i], bias[i], a, args.lower_bound);
        const float beyond = exp2_fast(min(gate - kPairGateFloor, 0.f));
        const float d = fma(crossing[i], beyond, from_start[i] + own[1][i] + state[i]);
        const GateDerivative slope = gate_derivative(x[i], bias[i], a, args.lower_bound);
        x[i] = d * slope.raw;
        d_bias[i] += x[i];
        d_a = fma(d, slope.a_log, d_a);
      }
      store_elements(d_g + r * args.d_g.stride_token, x);
    }
  }
  float* bias_sums = shared_at<float>(GradientShared::parameters);
  if constexpr (Config::dt_bias)
    if (map.active)
#pragma unroll
      for (int i = 0; i < width; ++i)
        bias_sums[map.tile * kPaddedK + map.channel + i] = d_bias[i];
  if constexpr (kReadsA) {
    d_a = warp_sum(d_a);
    if (lane_index() == 0) bias_sums[kChunkTiles * kPaddedK + thread_index() / 32] = d_a;
  }
}

/// This chunk's parts of d dt_bias and d A_log.
KDA_DEVICE void store_parameter_parts(const KernelArgs& args, i64 chunk, int head) {
  const float* sums = shared_at<float>(GradientShared::parameters);
  const i64 at = chunk * args.value_heads + head;
  if constexpr (Config::dt_bias)
    for (int channel = thread_index(); channel < kPaddedK; channel += kGradientThreads) {
      float sum = 0.f;
#pragma unroll
      for (int t = 0; t < kChunkTiles; ++t)
        sum += sums[t * kPaddedK + channel];
      static_cast<float*>(args.workspace[6])[at * kPaddedK + channel] = sum;
    }
  if constexpr (kReadsA)
    if (thread_index() == 0) {
      float sum = 0.f;
      for (int warp = 0; warp < kGradientWarps; ++warp)
        sum += sums[kChunkTiles * kPaddedK + warp];
      static_cast<float*>(args.workspace[7])[at] = sum;
    }
}

KDA_DEVICE void compute_gradients(const KernelArgs& args) {
  const int head = block_index_x() % args.value_heads;
  const i64 chunk = block_index_x() / args.value_heads, key_head = head / Config::group;
  ChunkSpan* const shared_span = shared_at<ChunkSpan>(GradientShared::span);
  if (thread_index() == 0) *shared_span = find_chunk(args, chunk_offsets(args), chunk);
  sync_block();
  const ChunkSpan span = *shared_span;
  if (span.rows == 0) return;

  Operand* row_q = shared_at<Operand>(GradientShared::row_q);
  Operand* row_k = shared_at<Operand>(GradientShared::row_k);
  Operand* d_o = shared_at<Operand>(GradientShared::d_o);
  load_rows<Config::K, 1, kGradientThreads, Config::Element>(row_q, args.q, shared_span, key_head);
  load_rows<Config::K, 1, kGradientThreads, Config::Element>(row_k, args.k, shared_span, key_head);
  load_rows<Config::V, 1, kGradientThreads, Config::Element>(d_o, args.d_o, shared_span, head);
  commit_copies();
  load_beta<1, kGradientThreads>(args, shared_span, head, shared_at<float>(GradientShared::beta));
  const GradientMap map;
  evaluate_gates(args, map, span, map.tile * kTileRows, head, gradient_sums(),
                 [&](int row, const float(&g)[GradientMap::width]) {
                   store_elements(table_at(GradientShared::anchored, map.tile * kTileRows + row, map.channel),
                                  g);
                 });
  wait_copies<0>();
  sync_block();
  accumulate_anchors<kGradientThreads, kChunkTiles>(gradient_sums());
  write_row_factors<kGradientThreads, Config::chunk>(row_q, row_k, 1.f,
                                                     shared_at<float>(GradientShared::q_factor),
                                                     shared_at<float>(GradientShared::k_factor));
  const int warp = warp_index();
  RowSums d_beta[kChunkTiles];
#pragma unroll 1
  for (int block = warp; block < kValueBlocks; block += kGradientWarps)
    load_values(args, span, chunk, head, block, d_beta);
#pragma unroll
  for (int tile = 0; tile < kChunkTiles; ++tile)
    write_row_sums(d_beta[tile], 0, tile);
  sync_block();
  if (map.active) write_pair_operands(args, map);
#pragma unroll 1
  for (int task = warp; task < kChunkPairs; task += kGradientWarps)
    write_pair_gradients(task);
  sync_block();
  BlockGradients gradients[kWarpBlocks];
#pragma unroll
  for (int n = 0; n < kWarpBlocks; ++n)
    if (const int block = warp + n * kGradientWarps; block < kKeyBlocks)
      multiply_states(args, chunk, head, block, gradients[n]);
  sync_block(); // dO, U and R are dead
#pragma unroll
  for (int tile = 0; tile < kChunkTiles; ++tile) {
    WarpSums sums;
#pragma unroll
    for (int n = 0; n < kWarpBlocks; ++n)
      if (const int block = warp + n * kGradientWarps; block < kKeyBlocks)
        combine(args, span, head, tile, block, gradients[n], sums);
    write_row_sums(sums.beta, 1, tile);
    if constexpr (Config::qk_l2norm) {
      write_row_sums(sums.q, 2, tile);
      write_row_sums(sums.k, 3, tile);
    }
  }
  sync_block();
#pragma unroll
  for (int n = 0; n < kWarpBlocks; ++n)
    if (const int block = warp + n * kGradientWarps; block < kKeyBlocks)
#pragma unroll
      for (int tile = 0; tile < kChunkTiles; ++tile)
        store_key_gradients(args, span, head, tile, block, gradients[n]);
  store_beta_gradients(args, span, head);
  sum_tile_tables(map);
  sync_block();
  write_gate_gradients(args, span, head, map);
  sync_block();
  store_parameter_parts(args, chunk, head);
}

} // namespace kda
