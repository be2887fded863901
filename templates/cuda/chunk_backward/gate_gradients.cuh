#pragma once
// dg through the gate from the tables of key_gradients.cuh, and d dt_bias and d A_log of the chunk.
#include "chunk_backward/gradient_shared.cuh"

namespace kda {

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

} // namespace kda
