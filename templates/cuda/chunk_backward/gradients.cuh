#pragma once
// Chunk-parallel last part of the backward: from S, D, U, dU (workspace.cuh) and the inputs of one chunk of
// one value head to its gradients.
//
// With A = diag(beta) L, X = (I + A)^-1 and the U of chunk_backward/scan.cuh, (I + A) U = diag(beta) (v -
// k 2^G S), so that R = X^T dU is the gradient of the right side and
//   dv = beta R,   dA = -R U^T,   dM = dO U^T  (lower triangles)
//   d(scale q) = 2^G (dO S^T) + sum_j dM_ij k_j 2^(G_i - G_j)
//   dk = 2^(tot - G) (U D^T) + beta (-2^G (R S^T) + sum_j dA_ij k_j 2^(G_i - G_j))
//        + sum_i (dM_ij scale q_i + dA_ij beta_i k_i) 2^(G_i - G_j)
// dg_t adds up every product whose decay contains token t: those from S to tokens >= t, from tokens < t to D,
// from S to D, and pairs i >= t > j. Pairs with both ends >= t must cancel: each pair's two shares are made
// of the same rounded numbers, and pairs i = j, which do not decay, are kept out of the pair products. The
// pair sum is scaled by what the clamp at kPairGateFloor took from token t itself.
//
// Budget at K = V = 128, bf16, C = 64, 8 warps: reads 3.2 KB and writes 1 KB a token and head, 207 KB of
// shared memory, about 370 mma.sync a warp.
#include "chunk_backward/gate_gradients.cuh"
#include "chunk_backward/key_gradients.cuh"
#include "chunk_backward/slab.cuh"
#include "chunk_backward/value_gradients.cuh"

namespace kda {

KDA_DEVICE void compute_gradients(const KernelArgs& args) {
  const int head = block_index_x() % args.value_heads;
  const i64 chunk = block_index_x() / args.value_heads, key_head = head / Config::group;
  ChunkSpan* const shared_span = shared_at<ChunkSpan>(GradientShared::span);
  if (thread_index() == 0) *shared_span = find_slab_chunk(args, chunk);
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
        store_key_gradients(args, span, chunk, head, tile, block, gradients[n]);
  store_beta_gradients(args, span, head);
  sum_tile_tables(map);
  sync_block();
  write_gate_gradients(args, span, head, map);
  sync_block();
  store_parameter_parts(args, chunk_number(args, chunk), head);
}

} // namespace kda
