#pragma once
// dq, dk and dbeta from S, D and the pairs, and the tables that dg is made of.
#include "chunk_backward/gradient_shared.cuh"
#include "stages/pair.cuh"

namespace kda {

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
/// a = sum_j dA_ij column_k_j, k = sum_i dM_ij row_q_i + dA_ij row_k_i.
struct PairSums {
  Accumulator q, a, k;
};
KDA_DEVICE PairSums multiply_pairs(int tile, int block) {
  const Operand* d_m = shared_at<Operand>(GradientShared::d_m);
  const Operand* d_a = shared_at<Operand>(GradientShared::d_a);
  const int lane_channel = block * 16 + (lane_index() & 3) * 2;
  PairSums sums;
#pragma unroll
  for (int j = 0; j < kChunkTiles; ++j) {
    if (j > tile) break;
    if (j > 0) {
      move_anchor<false>(sums.q, j, lane_channel);
      move_anchor<false>(sums.a, j, lane_channel);
    }
    u32 a[4], b[4];
    load_b_transposed<kPaddedK>(b, shared_at<Operand>(GradientShared::column_k), j * kTileRows, block * 16);
    load_a<Config::chunk>(a, d_m, tile * kTileRows, j * kTileRows);
    multiply_add(sums.q, a, b);
    load_a<Config::chunk>(a, d_a, tile * kTileRows, j * kTileRows);
    multiply_add(sums.a, a, b);
  }
#pragma unroll
  for (int i = kChunkTiles - 1; i >= 0; --i) {
    if (i < tile) break;
    if (i < kChunkTiles - 1) move_anchor<true>(sums.k, i + 1, lane_channel);
    u32 a[4], b[4];
    load_a_transposed<Config::chunk>(a, d_m, i * kTileRows, tile * kTileRows);
    load_b_transposed<kPaddedK>(b, shared_at<Operand>(GradientShared::row_q), i * kTileRows, block * 16);
    multiply_add(sums.k, a, b);
    load_a_transposed<Config::chunk>(a, d_a, i * kTileRows, tile * kTileRows);
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
      float row_q[2], row_k[2], column_k[2];
      const int place = row * Tile<kPaddedK>::stride + channel;
      load_elements(shared_at<const Operand>(GradientShared::row_q) + place, row_q);
      load_elements(shared_at<const Operand>(GradientShared::row_k) + place, row_k);
      load_elements(shared_at<const Operand>(GradientShared::column_k) + place, column_k);
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
        const float k_row = fma(pairs.a.d[n][e], grown, k_state); // without beta
        const float dq = fma(d_m, k, fma(pairs.q.d[n][e], grown, q_state));
        const float dk = fma(d_m, q, fma(pairs.k.d[n][e], shrunk, fma(beta, k_row, k_end)));
        from_start[i] = fma(q, q_state, beta * k * k_state);
        to_end[i] = k * k_end;
        crossing[i] =
            fma(row_q[i], pairs.q.d[n][e], fma(row_k[i], pairs.a.d[n][e], -column_k[i] * pairs.k.d[n][e]));
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
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int r = (lane_index() >> 2) + e * 4, c = n * 8 + (lane_index() & 3) * 2;
      const float pair[2] = {x.d[n][e], x.d[n][e + 1]};
      if (r < rows && c < columns) store_elements(p + r * Config::K + c, pair);
    }
}

/// dq and dk through the norm, to the caller or, for grouped heads, to the workspace.
KDA_DEVICE void store_key_gradients(const KernelArgs& args, const ChunkSpan& span, i64 chunk, int head,
                                    int tile, int block, BlockGradients& gradients) {
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
    const int at = tile * kTileRows * Config::K + block * 16;
    store_part(part_of<8>(args, chunk, head) + at, q, rows, columns);
    store_part(part_of<9>(args, chunk, head) + at, k, rows, columns);
  }
}

KDA_DEVICE void store_beta_gradients(const KernelArgs& args, const ChunkSpan& span, int head) {
  for (int row = thread_index(); row < span.rows; row += kGradientThreads) {
    const float raw = to_float(*row_of<const Config::Beta>(args.beta, span.batch, span.first + row, head));
    *row_of<Config::Beta>(args.d_beta, span.batch, span.first + row, head) =
        from_float<Config::Beta>((read_row_sum(0, row) + read_row_sum(1, row)) * beta_derivative(raw));
  }
}

} // namespace kda
