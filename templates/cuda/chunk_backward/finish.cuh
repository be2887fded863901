#pragma once
// Sums of the backward over what one CTA does not see, always in the same order: over chunks for d dt_bias
// and d A_log, over the value heads of a group for dq and dk. And zeros for tokens behind the last sequence.
#include "chunk_backward/slab.cuh"
#include "chunk_backward/workspace.cuh"
#include "stages/token_load.cuh"

namespace kda {

constexpr int kReduceThreads = 512;

KDA_DEVICE i64 chunk_count(const KernelArgs& args) {
  return Config::varlen ? chunk_offsets(args)[args.sequences] : args.batch * chunks_of(args.tokens);
}

/// One CTA a value head: thread i adds the chunks i / width, i / width + lanes, ... of channel i % width.
template <int width>
KDA_DEVICE void reduce_chunks(const KernelArgs& args, int head, const float* parts, float* out,
                              int channels) {
  constexpr int lanes = kReduceThreads / width;
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int channel = thread_index() % width, lane = thread_index() / width;
  const i64 chunks = chunk_count(args);
  float sum = 0.f;
  if (lane < lanes)
#pragma unroll 8
    for (i64 chunk = lane; chunk < chunks; chunk += lanes)
      sum += parts[(chunk * args.value_heads + head) * width + channel];
  sync_block();
  shared[thread_index()] = sum;
  sync_block();
  if (thread_index() < channels) {
    float all = 0.f;
    for (int i = 0; i < lanes; ++i)
      all += shared[i * width + channel];
    out[thread_index()] = all;
  }
}

KDA_DEVICE void reduce_parameters(const KernelArgs& args) {
  const int head = block_index_x();
  if constexpr (Config::dt_bias)
    if (args.d_dt_bias != nullptr)
      reduce_chunks<kPaddedK>(args, head, static_cast<const float*>(args.workspace[6]),
                              args.d_dt_bias + i64(head) * Config::K, Config::K);
  if constexpr (kReadsA)
    if (args.d_A_log != nullptr)
      reduce_chunks<1>(args, head, static_cast<const float*>(args.workspace[7]), args.d_A_log + head, 1);
}

constexpr int kGroupThreads = 256;

/// One CTA a chunk and query/key head, four channels of one token a thread.
KDA_DEVICE void sum_group(const KernelArgs& args) {
  constexpr int groups = Config::K / 4;
  const int head = block_index_x() % args.heads;
  const i64 chunk = block_index_x() / args.heads;
  const ChunkSpan span = find_slab_chunk(args, chunk);
  for (int item = thread_index(); item < span.rows * groups; item += kGroupThreads) {
    const int row = item / groups, channel = item % groups * 4, at = row * Config::K + channel;
    float sums[2][4] = {};
    for (int i = 0; i < Config::group; ++i) {
      const int value_head = head * Config::group + i;
      float q[4], k[4];
      widen<float>(load_raw(part_of<8>(args, chunk, value_head) + at, true), q);
      widen<float>(load_raw(part_of<9>(args, chunk, value_head) + at, true), k);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sums[0][c] += q[c];
        sums[1][c] += k[c];
      }
    }
    store4(row_of<Config::Element>(args.d_q, span.batch, span.first + row, head) + channel, sums[0]);
    store4(row_of<Config::Element>(args.d_k, span.batch, span.first + row, head) + channel, sums[1]);
  }
}

/// Zeros the gradients behind the last packed sequence: of a value head, and of its query/key head when it is
/// the group's first.
KDA_DEVICE void fill_padding(const KernelArgs& args, int head, int thread, int threads) {
  const i64 begin = static_cast<const Config::Index*>(args.cu_seqlens)[args.sequences];
  const float zeros[4] = {};
  for (i64 token = begin + thread; token < args.tokens; token += threads) {
    for (int i = 0; i < Config::V; i += 4)
      store4(row_of<Config::Element>(args.d_v, 0, token, head) + i, zeros);
    for (int i = 0; i < Config::K; i += 4) {
      store4(row_of<Config::Gate>(args.d_g, 0, token, head) + i, zeros);
      if (head % Config::group != 0) continue;
      store4(row_of<Config::Element>(args.d_q, 0, token, head / Config::group) + i, zeros);
      store4(row_of<Config::Element>(args.d_k, 0, token, head / Config::group) + i, zeros);
    }
    *row_of<Config::Beta>(args.d_beta, 0, token, head) = from_float<Config::Beta>(0.f);
  }
}

} // namespace kda
