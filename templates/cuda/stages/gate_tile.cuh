#pragma once
// The gate over tiles of tokens, and back; used by gate.cu and by the backward.
//
// A CTA owns a value head and a tile of tokens of one batch row; Config::rows tokens a warp. The sums over
// tokens for d A_log and d dt_bias go through one partial sum a CTA in the workspace, added in a fixed order
// by gate_reduce_head, so that the same input gives the same bits.
//   workspace[0]: fp32 [HV, tiles, K] of d dt_bias; workspace[1]: fp32 [HV, tiles] of d A_log
#include "kernel_args.cuh"
#include "stages/gate.cuh"
#include "stages/token_load.cuh"

namespace kda {

using Gate = Config::Gate;
using Spread = RowSpread<Config::K>;

constexpr int kWarps = Config::scan_warps;
constexpr int kTileTokens = Config::rows * kWarps;
constexpr int kChannels = Spread::elements;

KDA_DEVICE i64 tiles_per_row(const KernelArgs& args) {
  return (args.tokens + kTileTokens - 1) / kTileTokens;
}

/// A CTA's tile, and this lane's place in it.
struct Tile {
  i64 index; ///< over batch and tokens
  i64 batch, begin, end;
  i64 packed_end; ///< tokens from here on are padding: zeros
  int value_head, lane, part;
};

KDA_DEVICE Tile find_tile(const KernelArgs& args) {
  Tile t;
  const i64 block = block_index_x(), per_row = tiles_per_row(args);
  t.value_head = static_cast<int>(block % args.value_heads);
  t.index = block / args.value_heads;
  t.batch = t.index / per_row;
  t.begin = t.index % per_row * kTileTokens;
  t.end = min(t.begin + kTileTokens, args.tokens);
  t.packed_end = args.tokens;
  if (Config::varlen && args.cu_seqlens != nullptr)
    t.packed_end = static_cast<const Config::Index*>(args.cu_seqlens)[args.sequences];
  t.lane = lane_index() % Spread::lanes;
  t.part = lane_index() / Spread::lanes;
  return t;
}

/// exp(A_log) and dt_bias of a value head; 1 and zeros where the gate reads none.
struct HeadGate {
  float a, bias[kChannels];
};

KDA_DEVICE HeadGate load_head_gate(const KernelArgs& args, const Tile& tile) {
  HeadGate h;
  h.a = kReadsA ? exp_clamped(args.A_log[tile.value_head]) : 1.f;
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    h.bias[c] = 0.f;
  if constexpr (Config::dt_bias)
    load_row<Config::K>(args.dt_bias + tile.value_head * i64(Config::K), tile.lane, h.bias);
  return h;
}

template <class T>
KDA_DEVICE void store_row(T* row, int lane, const float (&x)[kChannels]) {
#pragma unroll
  for (int j = 0; j < Spread::groups; ++j)
    if (Spread::valid(lane, j)) store4(row + Spread::channel(lane, j), x + 4 * j);
}

/// Gradients of the parameters that this lane's tokens give.
struct ParameterSums {
  float bias[kChannels], a_log;
};

/// d_g of one token, and its share of the parameter gradients.
KDA_DEVICE void gate_token_backward(const KernelArgs& args, const TokenTensor& d_gate, const Tile& tile,
                                    const HeadGate& head, i64 token, ParameterSums& sums) {
  float d[kChannels] = {};
  if (token < tile.packed_end) {
    float g[kChannels], dy[kChannels];
    load_row<Config::K>(row_of<const Gate>(args.g, tile.batch, token, tile.value_head), tile.lane, g);
    load_row<Config::K>(row_of<const float>(d_gate, tile.batch, token, tile.value_head), tile.lane, dy);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const GateDerivative slope = gate_derivative(g[c], head.bias[c], head.a, args.lower_bound);
      d[c] = dy[c] * slope.raw;
      sums.bias[c] += d[c];
      sums.a_log = fma(dy[c], slope.a_log, sums.a_log);
    }
  }
  store_row(row_of<Gate>(args.d_g, tile.batch, token, tile.value_head), tile.lane, d);
}

/// Adds the lanes that hold the same channels; every one of them gets the sum.
KDA_DEVICE float sum_parts(float x) {
#pragma unroll
  for (int mask = Spread::lanes; mask < 32; mask <<= 1)
    x += shuffle_xor(x, mask);
  return x;
}

/// Sums over the warps of the CTA through shared memory, [kWarps][K + 1] floats, A_log last. Element i of the
/// result goes to `store`(i, sum).
template <class Store>
KDA_DEVICE void sum_warps(ParameterSums sums, int lane, int part, const Store& store) {
  constexpr int kRow = Config::K + 1;
  float* shared = reinterpret_cast<float*>(shared_memory());
  float* mine = shared + thread_index() / 32 * kRow;
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    sums.bias[c] = sum_parts(sums.bias[c]);
  sums.a_log = warp_sum(sums.a_log);
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    if (part == 0 && Spread::valid(lane, c / 4)) mine[Spread::channel(lane, c / 4) + c % 4] = sums.bias[c];
  if (lane_index() == 0) mine[Config::K] = sums.a_log;
  sync_block();
  for (int i = thread_index(); i < kRow; i += kWarps * 32) {
    float sum = 0.f;
    for (int warp = 0; warp < kWarps; ++warp)
      sum += shared[warp * kRow + i];
    store(i, sum);
  }
}

/// This lane's part of the partial sums of a value head, tiles strided over the warps.
KDA_DEVICE ParameterSums load_partials(const KernelArgs& args, int value_head, int lane, int part) {
  const i64 tiles = args.batch * tiles_per_row(args);
  ParameterSums sums = {};
  if constexpr (Config::dt_bias) {
    const float* partial = static_cast<const float*>(args.workspace[0]) + value_head * tiles * Config::K;
    for (i64 t = thread_index() / 32 * Spread::rows + part; t < tiles; t += kWarps * Spread::rows) {
      float x[kChannels];
      load_row<Config::K>(partial + t * Config::K, lane, x);
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        sums.bias[c] += x[c];
    }
  }
  if constexpr (kReadsA) {
    const float* partial = static_cast<const float*>(args.workspace[1]) + value_head * tiles;
    for (i64 t = thread_index(); t < tiles; t += kWarps * 32)
      sums.a_log += partial[t];
  }
  return sums;
}

/// d_g of this CTA's tile from the fp32 gradient of the natural-log decay, and its partial sums.
KDA_DEVICE void gate_backward_tile(const KernelArgs& args, const TokenTensor& d_gate) {
  const Tile tile = find_tile(args);
  const HeadGate head = load_head_gate(args, tile);
  ParameterSums sums = {};
  for (i64 t = tile.begin + warp_index() * Spread::rows + tile.part; t < tile.end; t += kWarps * Spread::rows)
    gate_token_backward(args, d_gate, tile, head, t, sums);
  if constexpr (!kReadsA && !Config::dt_bias) return;
  const i64 slot = tile.value_head * (args.batch * tiles_per_row(args)) + tile.index;
  sum_warps(sums, tile.lane, tile.part, [&](int i, float sum) {
    if (i < Config::K) {
      if constexpr (Config::dt_bias) static_cast<float*>(args.workspace[0])[slot * Config::K + i] = sum;
    } else if constexpr (kReadsA) {
      static_cast<float*>(args.workspace[1])[slot] = sum;
    }
  });
}

/// d_A_log and d_dt_bias of value head block_index_x() from the partial sums.
KDA_DEVICE void gate_reduce_head(const KernelArgs& args) {
  const int head = block_index_x(), lane = lane_index() % Spread::lanes, part = lane_index() / Spread::lanes;
  sum_warps(load_partials(args, head, lane, part), lane, part, [&](int i, float sum) {
    if (i == Config::K) {
      if (args.d_A_log != nullptr) args.d_A_log[head] = sum;
    } else if (args.d_dt_bias != nullptr) {
      args.d_dt_bias[head * Config::K + i] = sum;
    }
  });
}

} // namespace kda
