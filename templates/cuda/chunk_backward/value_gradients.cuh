#pragma once
// U and R as operands, dv, and the gradients dM and dA of the pair matrices.
#include "chunk_backward/gradient_shared.cuh"
#include "stages/pair.cuh"

namespace kda {

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

/// dM and dA below the diagonal as operands; dM_ii apart.
KDA_DEVICE void write_pair_gradients(int task) {
  const TilePair pair = find_pair<kChunkTiles>(task);
  Accumulator m, a;
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
    multiply_add(a, r.w, columns);
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
    mask_diagonal(a, true);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int at = (pair.i * kTileRows + row + e * 4) * Tile<Config::chunk>::stride + pair.j * kTileRows +
                     column + n * 8;
      *reinterpret_cast<u32*>(shared_at<Operand>(GradientShared::d_m) + at) =
          pack2<Operand>(m.d[n][e], m.d[n][e + 1]);
      *reinterpret_cast<u32*>(shared_at<Operand>(GradientShared::d_a) + at) =
          pack2<Operand>(-a.d[n][e], -a.d[n][e + 1]);
    }
}

} // namespace kda
