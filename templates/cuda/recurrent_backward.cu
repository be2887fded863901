// The adjoint of the recurrence, token by token in fp32: every gradient, for every gate, without chunk
// algebra. The device reference of gradients.
//
// A CTA owns a tile of V rows of one state; K lies across the lanes of its warps, as in recurrent.cu. A first
// pass keeps the state at the start of every segment of Config::chunk tokens. Then, last segment first, the
// segment is run again keeping the decayed state S' of every token, and walked backwards. Rows of V only meet
// in the sums for dq, dk, dg and dbeta: through shared memory within a CTA, through the workspace between
// CTAs, always in the same order.
//   workspace[0], [1]: partial sums of d dt_bias and d A_log (stages/gate_tile.cuh)
//   workspace[2]: state at the start of every segment   [segment][HV][tile][kDense] fp32
//   workspace[3]: S' of the tokens of a segment         [CTA][Config::chunk][kDense] fp32
//   workspace[4]: sums of a tile                        [tile][B*T][HV][kSums] fp32: dq, dk, dg (K each),
//   dbeta workspace[5]: gradient of the natural-log decay     [B*T][HV][K] fp32
// Per token and value head at K=V=128: 64 KiB of S' written and read (from L2, when the CTAs' segments fit),
// one barrier.
#include "stages/gate_tile.cuh"

namespace kda {

using Element = Config::Element;
using State = Config::State;

constexpr int kThreads = Config::scan_warps * 32;
constexpr int kRows = Config::rows / Spread::rows; // of V, held by a lane
constexpr int kTileRows = Config::rows * Config::scan_warps;
constexpr int kTiles = (Config::V + kTileRows - 1) / kTileRows;
constexpr int kDense = kRows * kChannels * kThreads;
constexpr int kSums = 3 * Config::K + 4;
static_assert(kRows >= 1);

using Matrix = float[kRows][kChannels];

/// What a CTA works on, and this lane's place in it.
struct Work {
  i64 sequence, batch, begin, end, first_segment;
  int value_head, tile, lane, part;
  int row; ///< first V row of this lane
};

KDA_DEVICE Work find_work(const KernelArgs& args, i64 unit) {
  Work w;
  w.tile = static_cast<int>(unit % kTiles);
  unit /= kTiles;
  w.value_head = static_cast<int>(unit % args.value_heads);
  w.sequence = unit / args.value_heads;
  w.lane = lane_index() % Spread::lanes;
  w.part = lane_index() / Spread::lanes;
  w.row = w.tile * kTileRows + warp_index() * Config::rows + w.part * kRows;
  if constexpr (Config::varlen) {
    const auto* cu = static_cast<const Config::Index*>(args.cu_seqlens);
    w.batch = 0;
    w.begin = cu[w.sequence];
    w.end = cu[w.sequence + 1];
    w.first_segment =
        w.begin / Config::chunk + w.sequence; // ceil(len/C) segments always fit before the next one's
  } else {
    w.batch = w.sequence;
    w.begin = 0;
    w.end = args.tokens;
    w.first_segment = w.sequence * ((args.tokens + Config::chunk - 1) / Config::chunk);
  }
  return w;
}

// A tile of a state in the workspace: each thread's part where it writes 16 bytes beside its neighbour.
KDA_DEVICE void store_dense(float* to, const Matrix& x) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int j = 0; j < Spread::groups; ++j)
      store4(to + ((r * Spread::groups + j) * kThreads + thread_index()) * 4, x[r] + 4 * j);
}
KDA_DEVICE void load_dense_row(const float* from, int r, float (&x)[kChannels]) {
#pragma unroll
  for (int j = 0; j < Spread::groups; ++j)
    widen<float>(load_raw(from + ((r * Spread::groups + j) * kThreads + thread_index()) * 4, true),
                 x + 4 * j);
}

/// The caller's state, zero when absent.
KDA_DEVICE void load_state(const StateTensor& tensor, const Work& w, Matrix& x) {
  const State* base = static_cast<const State*>(tensor.data);
  if (base != nullptr) base += w.sequence * tensor.stride_sequence + w.value_head * tensor.stride_head;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int j = 0; j < Spread::groups; ++j) {
      const bool valid = base != nullptr && w.row + r < Config::V && Spread::valid(w.lane, j);
      const int channel = Spread::channel(w.lane, j);
      if constexpr (Config::state_v_k) {
        widen<State>(load_raw(base + (w.row + r) * Config::K + channel, valid), x[r] + 4 * j);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[r][4 * j + i] = valid ? to_float(base[(channel + i) * Config::V + w.row + r]) : 0.f;
      }
    }
}
KDA_DEVICE void store_state(const StateTensor& tensor, const Work& w, const Matrix& x) {
  if (tensor.data == nullptr) return;
  State* base = static_cast<State*>(tensor.data) + w.sequence * tensor.stride_sequence +
                w.value_head * tensor.stride_head;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int j = 0; j < Spread::groups; ++j) {
      if (w.row + r >= Config::V || !Spread::valid(w.lane, j)) continue;
      const int channel = Spread::channel(w.lane, j);
      if constexpr (Config::state_v_k) {
        store4(base + (w.row + r) * Config::K + channel, x[r] + 4 * j);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          base[(channel + i) * Config::V + w.row + r] = from_float<State>(x[r][4 * j + i]);
      }
    }
}

/// Sum over the lanes of a row, the same bits in each.
KDA_DEVICE float row_sum(float x) {
#pragma unroll
  for (int mask = Spread::lanes / 2; mask; mask >>= 1)
    x += shuffle_xor(x, mask);
  return x;
}

/// A q or k row, normalised when the problem says so; `factor` is what it was multiplied by.
KDA_DEVICE void load_key(const TokenTensor& tensor, i64 batch, i64 token, int head, int lane,
                         float (&x)[kChannels], float& factor) {
  load_row<Config::K>(row_of<const Element>(tensor, batch, token, head), lane, x);
  factor = 1.f;
  if constexpr (Config::qk_l2norm) {
    float square = 0.f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      square = fma(x[c], x[c], square);
    factor = l2norm_factor(row_sum(square));
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      x[c] *= factor;
  }
}

struct Token {
  float q[kChannels], k[kChannels], decay[kChannels], beta;
};
KDA_DEVICE Token load_token(const KernelArgs& args, const Work& w, const HeadGate& head, i64 t) {
  Token x;
  float ignored;
  const int key_head = w.value_head / Config::group;
  load_key(args.q, w.batch, t, key_head, w.lane, x.q, ignored);
  load_key(args.k, w.batch, t, key_head, w.lane, x.k, ignored);
  load_row<Config::K>(row_of<const Gate>(args.g, w.batch, t, w.value_head), w.lane, x.decay);
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    x.decay[c] = exp2_fast(gate_log2(x.decay[c], head.bias[c], head.a, args.lower_bound));
  x.beta = beta_value(to_float(*row_of<const Config::Beta>(args.beta, w.batch, t, w.value_head)));
  return x;
}
/// Element `row` of a [.., V] tensor; 0 past V.
KDA_DEVICE float value_at(const TokenTensor& tensor, const Work& w, i64 t, int row) {
  return row < Config::V ? to_float(row_of<const Element>(tensor, w.batch, t, w.value_head)[row]) : 0.f;
}

/// Decays the state; residual = v - S'^T k. Then S = S' + k beta residual, unless only S' is wanted.
KDA_DEVICE void decay_and_read(const KernelArgs& args, const Work& w, const Token& x, i64 t, Matrix& state,
                               float (&residual)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float read = 0.f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      state[r][c] *= x.decay[c];
      read = fma(x.k[c], state[r][c], read);
    }
    residual[r] = value_at(args.v, w, t, w.row + r) - row_sum(read);
  }
}
KDA_DEVICE void update(const Token& x, const float (&residual)[kRows], Matrix& state) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      state[r][c] = fma(x.k[c], x.beta * residual[r], state[r][c]);
}

/// What one token adds up over V.
struct Sums {
  float q[kChannels], k[kChannels], g[kChannels], beta;
};

/// `d_state` enters as the gradient of the state after the token and leaves as that of the state before it.
KDA_DEVICE Sums token_adjoint(const KernelArgs& args, const Work& w, const Token& x, i64 t,
                              const float* decayed, const float* residual, Matrix& d_state) {
  Sums sums = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float d_o = value_at(args.d_o, w, t, w.row + r), rest = residual[r], u = x.beta * rest;
    float before[kChannels], du = 0.f; // S' of this row
    load_dense_row(decayed, r, before);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) { // o = q^T S scale, S = S' + k u^T
      d_state[r][c] = fma(args.scale * x.q[c], d_o, d_state[r][c]);
      sums.q[c] = fma(args.scale * fma(x.k[c], u, before[c]), d_o, sums.q[c]);
      sums.k[c] = fma(d_state[r][c], u, sums.k[c]);
      du = fma(x.k[c], d_state[r][c], du);
    }
    du = row_sum(du); // u = beta (v - S'^T k)
    const float dv = x.beta * du;
    if (w.lane == 0) {
      sums.beta = fma(du, rest, sums.beta);
      if (w.row + r < Config::V)
        row_of<Element>(args.d_v, w.batch, t, w.value_head)[w.row + r] = from_float<Element>(dv);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) { // S' = diag(e^g) S
      sums.k[c] = fma(-before[c], dv, sums.k[c]);
      d_state[r][c] = fma(-x.k[c], dv, d_state[r][c]);
      sums.g[c] = fma(d_state[r][c], before[c], sums.g[c]);
      d_state[r][c] *= x.decay[c];
    }
  }
  return sums;
}

/// Adds the warps' sums in order; `shared` is [warps][kSums] and free to be written by this thread.
KDA_DEVICE void store_sums(const Sums& sums, const Work& w, float* shared, float* out) {
  float* mine = shared + warp_index() * kSums;
#pragma unroll
  for (int j = 0; j < Spread::groups; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float q = sum_parts(sums.q[4 * j + i]), k = sum_parts(sums.k[4 * j + i]),
                  g = sum_parts(sums.g[4 * j + i]);
      if (w.part != 0 || !Spread::valid(w.lane, j)) continue;
      float* at = mine + Spread::channel(w.lane, j) + i;
      at[0] = q;
      at[Config::K] = k;
      at[2 * Config::K] = g;
    }
  const float beta = sum_parts(sums.beta);
  if (lane_index() == 0) mine[3 * Config::K] = beta;
  sync_block();
  for (int i = thread_index(); i <= 3 * Config::K; i += kThreads) {
    float sum = 0.f;
    for (int warp = 0; warp < Config::scan_warps; ++warp)
      sum += shared[warp * kSums + i];
    out[i] = sum;
  }
}

/// One (sequence, value head, tile).
KDA_DEVICE void backward_unit(const KernelArgs& args, const Work& w) {
  float* const residuals = reinterpret_cast<float*>(shared_memory()); // [chunk][kTileRows]
  float* const shared = residuals + Config::chunk * kTileRows;        // two of [warps][kSums]
  const Tile place{0, w.batch, 0, 0, 0, w.value_head, w.lane, w.part};
  const HeadGate head = load_head_gate(args, place);
  const i64 segments = (w.end - w.begin + Config::chunk - 1) / Config::chunk;
  const i64 rows = args.batch * args.tokens;
  const auto segment_state = [&](i64 s) {
    return static_cast<float*>(args.workspace[2]) +
           (((w.first_segment + s) * args.value_heads + w.value_head) * kTiles + w.tile) * kDense;
  };
  float* const scratch =
      static_cast<float*>(args.workspace[3]) + i64(block_index_x()) * Config::chunk * kDense;
  const int tile_row = w.row - w.tile * kTileRows;

  Matrix state;
  load_state(args.initial_state, w, state);
  for (i64 s = 0; s < segments; ++s) {
    store_dense(segment_state(s), state);
    if (s + 1 == segments) break; // what follows the last start is run again below
    for (i64 t = w.begin + s * Config::chunk; t < w.begin + (s + 1) * Config::chunk; ++t) {
      const Token x = load_token(args, w, head, t);
      float residual[kRows];
      decay_and_read(args, w, x, t, state, residual);
      update(x, residual, state);
    }
  }
  Matrix d_state;
  load_state(args.d_final_state, w, d_state);
  int parity = 0;
  for (i64 s = segments - 1; s >= 0; --s) {
    const i64 begin = w.begin + s * Config::chunk, end = min(begin + Config::chunk, w.end);
    const float* start = segment_state(s);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      load_dense_row(start, r, state[r]);
    for (i64 t = begin; t < end; ++t) {
      const Token x = load_token(args, w, head, t);
      float residual[kRows];
      decay_and_read(args, w, x, t, state, residual);
      store_dense(scratch + (t - begin) * kDense, state);
      if (w.lane == 0)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          residuals[(t - begin) * kTileRows + tile_row + r] = residual[r];
      update(x, residual, state);
    }
    sync_warp();
    for (i64 t = end - 1; t >= begin; --t) {
      const Token x = load_token(args, w, head, t);
      const Sums sums = token_adjoint(args, w, x, t, scratch + (t - begin) * kDense,
                                      residuals + (t - begin) * kTileRows + tile_row, d_state);
      float* out = static_cast<float*>(args.workspace[4]) +
                   ((w.tile * rows + w.batch * args.tokens + t) * args.value_heads + w.value_head) * kSums;
      // Two buffers: a thread that writes one has passed the barrier behind which the other was last read.
      store_sums(sums, w, shared + parity * Config::scan_warps * kSums, out);
      parity ^= 1;
    }
    sync_warp();
  }
  store_state(args.d_initial_state, w, d_state);
  sync_block();
}

/// This lane's part of sum `which` (0: dq, 1: dk, 2: dg) of a row, over the tiles in order.
KDA_DEVICE void load_sums(const KernelArgs& args, i64 row, int value_head, int which, int lane,
                          float (&x)[kChannels]) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    x[c] = 0.f;
  for (int tile = 0; tile < kTiles; ++tile) {
    float part[kChannels];
    load_row<Config::K>(static_cast<const float*>(args.workspace[4]) +
                            ((tile * args.batch * args.tokens + row) * args.value_heads + value_head) *
                                kSums +
                            which * Config::K,
                        lane, part);
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      x[c] += part[c];
  }
}

/// Through y = x rsqrt(sum x^2 + eps): dx = factor (dy - y (y.dy)).
KDA_DEVICE void norm_adjoint(const TokenTensor& tensor, const Tile& place, i64 token, int head,
                             float (&d)[kChannels]) {
  if constexpr (Config::qk_l2norm) {
    float y[kChannels], factor, dot = 0.f;
    load_key(tensor, place.batch, token, head, place.lane, y, factor);
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      dot = fma(y[c], d[c], dot);
    dot = row_sum(dot);
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      d[c] = factor * fma(-y[c], dot, d[c]);
  }
}

KDA_DEVICE void zero_row(const TokenTensor& tensor, i64 batch, i64 token, int head, int lane) {
  Element* row = row_of<Element>(tensor, batch, token, head);
  for (int i = 4 * lane; i < Config::V; i += 4 * Spread::lanes) {
    const float zeros[4] = {};
    store4(row + i, zeros);
  }
}

/// All that a token's query/key head gets, and dbeta, dg of its group, from the tiles' sums. `lane` of
/// Spread::lanes; rows past the end only take part in the shuffles.
KDA_DEVICE void finish_row(const KernelArgs& args, i64 row, int head, bool wanted, bool padding, int lane) {
  const Tile place{0, row / args.tokens, 0, 0, 0, 0, lane, 0};
  const i64 token = row % args.tokens;
  float dq[kChannels] = {}, dk[kChannels] = {};
  for (int i = 0; i < Config::group; ++i) {
    const int value_head = head * Config::group + i;
    float dg[kChannels] = {}, d_beta = 0.f;
    if (!padding) {
      float part[kChannels];
      load_sums(args, row, value_head, 0, lane, part);
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        dq[c] += part[c];
      load_sums(args, row, value_head, 1, lane, part);
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        dk[c] += part[c];
      load_sums(args, row, value_head, 2, lane, dg);
      for (int tile = 0; tile < kTiles; ++tile)
        d_beta += static_cast<const float*>(
            args.workspace[4])[((tile * args.batch * args.tokens + row) * args.value_heads + value_head) *
                                   kSums +
                               3 * Config::K];
      const float raw = to_float(*row_of<const Config::Beta>(args.beta, place.batch, token, value_head));
      d_beta *= beta_derivative(raw);
    }
    if (!wanted) continue;
    store_row(static_cast<float*>(args.workspace[5]) + (row * args.value_heads + value_head) * Config::K,
              lane, dg);
    if (lane == 0)
      *row_of<Config::Beta>(args.d_beta, place.batch, token, value_head) = from_float<Config::Beta>(d_beta);
    if (padding) zero_row(args.d_v, place.batch, token, value_head, lane);
  }
  norm_adjoint(args.q, place, token, head, dq);
  norm_adjoint(args.k, place, token, head, dk);
  if (!wanted) return;
  store_row(row_of<Element>(args.d_q, place.batch, token, head), lane, dq);
  store_row(row_of<Element>(args.d_k, place.batch, token, head), lane, dk);
}

} // namespace kda

#if KDA_COMPILES(kda_backward_scan)
KDA_KERNEL(kda::Config::scan_warps * 32, 1) kda_backward_scan(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  const i64 units = i64(args.sequences) * args.value_heads * kTiles;
  for (i64 unit = block_index_x(); unit < units; unit += grid_size_x())
    backward_unit(args, find_work(args, unit));
}
#endif

/// Spread::rows rows of [B*T][H] a warp.
#if KDA_COMPILES(kda_backward_finish)
KDA_KERNEL(kda::Config::scan_warps * 32, 1) kda_backward_finish(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  const i64 items = args.batch * args.tokens * args.heads;
  const i64 item = (i64(block_index_x()) * Config::scan_warps + warp_index()) * Spread::rows +
                   lane_index() / Spread::lanes;
  const i64 at = kda::min(item, items - 1), row = at / args.heads;
  bool padding = false;
  if constexpr (Config::varlen)
    padding = row >= static_cast<i64>(static_cast<const Config::Index*>(args.cu_seqlens)[args.sequences]);
  finish_row(args, row, static_cast<int>(at % args.heads), item < items, padding,
             lane_index() % Spread::lanes);
}
#endif

#if KDA_COMPILES(kda_backward_gate)
KDA_KERNEL(kda::Config::scan_warps * 32, 1) kda_backward_gate(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  const TokenTensor d_gate{args.workspace[5], args.tokens * args.value_heads * Config::K,
                           i64(args.value_heads) * Config::K, Config::K};
  gate_backward_tile(args, d_gate);
}
#endif

/// One CTA a value head.
#if KDA_COMPILES(kda_backward_reduce)
KDA_KERNEL(kda::Config::scan_warps * 32, 1) kda_backward_reduce(KDA_GRID_CONSTANT kda::KernelArgs args) {
  kda::gate_reduce_head(args);
}
#endif
