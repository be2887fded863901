// The recurrence token by token, in fp32, the state in registers. The decode form, and the device reference
// that the tuner checks every other kernel against.
//
// A warp owns Config::rows rows (of V) of one state: they never depend on each other, so no warp ever waits
// for another. K lies across the lanes. Per token and row: S' = d S, then a = k.S' and b = q.S' in one
// reduction, u = beta (v - a), S = S' + k u, and o = b + (q.k) u, which needs no second reduction after the
// update.
#include "recurrent/places.cuh"
#include "recurrent/state.cuh"
#include "stages/gate.cuh"

namespace kda {

using Element = Config::Element;
using Gate = Config::Gate;
using Beta = Config::Beta;

/// Zeros this warp's rows of o.
KDA_DEVICE void zero_output(const KernelArgs& args, const Work& w) {
  const i64 first = w.row - w.part * kRows;
  for (i64 i = lane_index(); i < (w.end - w.begin) * Config::rows; i += 32) {
    const i64 row = first + i % Config::rows;
    if (row < Config::V)
      row_of<Element>(args.o, w.batch, w.begin + i / Config::rows, w.value_head)[row] =
          from_float<Element>(0.f);
  }
}

/// What the tokens of a value head share.
struct Head {
  const Element *q, *k, *v; ///< row 0 of the batch row
  const Gate* g;
  const Beta* beta;
  Element* o;
  float a, bias[kChannels];
};

KDA_DEVICE Head load_head(const KernelArgs& args, const Work& w) {
  Head h;
  const i64 head = w.value_head / Config::group;
  h.q = row_of<const Element>(args.q, w.batch, 0, head);
  h.k = row_of<const Element>(args.k, w.batch, 0, head);
  h.v = row_of<const Element>(args.v, w.batch, 0, w.value_head);
  h.g = row_of<const Gate>(args.g, w.batch, 0, w.value_head);
  h.beta = row_of<const Beta>(args.beta, w.batch, 0, w.value_head);
  h.o = row_of<Element>(args.o, w.batch, 0, w.value_head);
  h.a = 1.f;
  if constexpr (kReadsA) h.a = exp_clamped(args.A_log[w.value_head]);
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    h.bias[c] = 0.f;
  if constexpr (Config::dt_bias)
    load_row<Config::K>(args.dt_bias + w.value_head * i64(Config::K), w.lane, h.bias);
  return h;
}

/// A token as it lies in memory.
struct Token {
  Raw4<Element> q[Spread::groups], k[Spread::groups];
  Raw4<Gate> g[Spread::groups];
  Element v[kSlots];
  Beta beta;
};

KDA_DEVICE Token load_token(const KernelArgs& args, const Work& w, const Head& h, i64 t) {
  Token x;
#pragma unroll
  for (int j = 0; j < Spread::groups; ++j) {
    const int channel = Spread::channel(w.lane, j);
    const bool valid = Spread::valid(w.lane, j);
    x.q[j] = load_raw(h.q + t * args.q.stride_token + channel, valid);
    x.k[j] = load_raw(h.k + t * args.k.stride_token + channel, valid);
    x.g[j] = load_raw(h.g + t * args.g.stride_token + channel, valid);
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
    x.v[s] = h.v[t * args.v.stride_token + min(w.sum_row + s, Config::V - 1)];
  x.beta = h.beta[t * args.beta.stride_token];
  return x;
}

/// A token as the recurrence needs it: q and k normalised, q scaled. None of it depends on the state.
struct Prepared {
  float q[kChannels], k[kChannels], decay[kChannels];
  float v[kSlots], beta, qk;
};

/// Sum over the lanes of a row, the same bits in each.
KDA_DEVICE float row_sum(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask; mask >>= 1)
    x += shuffle_xor(x, mask);
  return x;
}

KDA_DEVICE Prepared prepare(const KernelArgs& args, const Head& h, const Token& token) {
  Prepared x;
  float g[kChannels], qq = 0.f, kk = 0.f, qk = 0.f;
#pragma unroll
  for (int j = 0; j < Spread::groups; ++j) {
    widen<Element>(token.q[j], x.q + 4 * j);
    widen<Element>(token.k[j], x.k + 4 * j);
    widen<Gate>(token.g[j], g + 4 * j);
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    x.decay[c] = exp2_fast(gate_log2(g[c], h.bias[c], h.a, args.lower_bound));
    qq = fma(x.q[c], x.q[c], qq);
    kk = fma(x.k[c], x.k[c], kk);
    qk = fma(x.q[c], x.k[c], qk);
  }
  float q_factor = args.scale, k_factor = 1.f;
  if constexpr (Config::qk_l2norm) {
    q_factor *= l2norm_factor(row_sum(qq));
    k_factor = l2norm_factor(row_sum(kk));
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    x.q[c] *= q_factor;
    x.k[c] *= k_factor;
  }
  x.qk = row_sum(qk) * q_factor * k_factor;
  x.beta = beta_value(to_float(token.beta));
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
    x.v[s] = to_float(token.v[s]);
  return x;
}

/// Sums `count` values over 2 * mask lanes. Each step sends one half of the values away and keeps the other,
/// so 16 values take 16 shuffles over 32 lanes and not 80; lane l ends with the values from l * count / lanes
/// on.
template <int count, int mask>
KDA_DEVICE void reduce_scatter(float* x, int lane) {
  if constexpr (count > 1) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const float sent = upper ? x[i] : x[i + count / 2];
      const float kept = upper ? x[i + count / 2] : x[i];
      x[i] = kept + shuffle_xor(sent, mask);
    }
  } else {
    x[0] += shuffle_xor(x[0], mask);
  }
  if constexpr (mask > 1) reduce_scatter<(count + 1) / 2, mask / 2>(x, lane);
}

/// Advances the state by one token; writes o, and u where updates are kept.
KDA_DEVICE void step(float (&state)[kRows][kChannels], const Prepared& x, const Work& w, Element* o,
                     float* kept_u) {
  float sums[2 * kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float a = 0.f, b = 0.f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      state[r][c] *= x.decay[c];
      a = fma(x.k[c], state[r][c], a);
      b = fma(x.q[c], state[r][c], b);
    }
    sums[r] = a;
    sums[kRows + r] = b;
  }
  reduce_scatter<2 * kRows, kLanes / 2>(sums, w.lane);
  float u[kSlots];
  const bool writes = w.lane >= kLanes / 2 && w.lane % kSpan == 0;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    u[s] = x.beta * (x.v[s] - sums[s]); // in the lower half of the lanes
    const float value = fma(x.qk, shuffle_xor(u[s], kLanes / 2), sums[s]);
    if (writes && w.sum_row + s < Config::V) o[w.sum_row + s] = from_float<Element>(value);
    if constexpr (Config::updates)
      if (w.lane < kLanes / 2 && w.lane % kSpan == 0 && w.sum_row + s < Config::V)
        kept_u[w.sum_row + s] = u[s];
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float row_u = shuffle(u[r % kSlots], w.part * kLanes + r / kSlots * kSpan);
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      state[r][c] = fma(x.k[c], row_u, state[r][c]);
  }
}

KDA_DEVICE float* kept_u(const KernelArgs& args, const Work& w, i64 t) {
  if constexpr (!Config::updates) return nullptr;
  return row_of<float>(args.update_u, w.batch, t, w.value_head);
}
/// One warp keeps k and decay of a token; k is that of all value heads of a group.
KDA_DEVICE void keep_update(const KernelArgs& args, const Work& w, const Prepared& x, i64 t) {
  if (w.row != 0) return;
  float* const decay = row_of<float>(args.update_decay, w.batch, t, w.value_head);
  float* const k = row_of<float>(args.update_k, w.batch, t, w.value_head / Config::group);
#pragma unroll
  for (int j = 0; j < Spread::groups; ++j) {
    const int channel = Spread::channel(w.lane, j);
    if (!Spread::valid(w.lane, j)) continue;
    store4(decay + channel, x.decay + 4 * j);
    if (w.value_head % Config::group == 0) store4(k + channel, x.k + 4 * j);
  }
}

/// A token, and what the call keeps of it.
KDA_DEVICE void advance(const KernelArgs& args, const Work& w, const Head& h, const Prepared& x, i64 t,
                        float (&state)[kRows][kChannels]) {
  step(state, x, w, h.o + t * args.o.stride_token, kept_u(args, w, t));
  if constexpr (Config::updates) keep_update(args, w, x, t);
  if constexpr (Config::every_state) store_state(args.final_state, place_after(args, w, t), w, state);
}

/// Few tokens: one after the other.
KDA_DEVICE void scan_plain(const KernelArgs& args, const Work& w, const Head& h,
                           float (&state)[kRows][kChannels]) {
  for (i64 t = w.begin; t < w.end; ++t)
    advance(args, w, h, prepare(args, h, load_token(args, w, h, t)), t, state);
}

/// A tree of tokens: one whose parent is not the token before it starts again from the initial state, to
/// which the updates on the way to the parent are applied.
KDA_DEVICE void scan_tree(const KernelArgs& args, const Work& w, const Head& h, i64 read,
                          float (&state)[kRows][kChannels]) {
  for (i64 t = w.begin; t < w.end; ++t) {
    const i64 parent = parent_of(args, w, t - w.begin);
    if (w.begin + parent != t - 1) {
      sync_warp(); // other lanes have written u
      load_state(args.initial_state, read, w, state);
      const u64 path = path_to(args, w, parent);
      for (i64 i = 0; i <= parent; ++i) {
        if ((path >> i & 1) == 0) continue;
        const Prepared x = prepare(args, h, load_token(args, w, h, w.begin + i));
        apply_update(w, x.k, x.decay, kept_u(args, w, w.begin + i), state);
      }
    }
    advance(args, w, h, prepare(args, h, load_token(args, w, h, t)), t, state);
  }
}

/// Many tokens: loads run Config::stages tokens ahead and the next token is prepared during the step, so that
/// only the chain through the state is left to wait for.
KDA_DEVICE void scan_pipelined(const KernelArgs& args, const Work& w, const Head& h,
                               float (&state)[kRows][kChannels]) {
  if (w.begin >= w.end) return;
  Token ahead[Config::stages];
#pragma unroll
  for (int i = 0; i < Config::stages; ++i)
    ahead[i] = load_token(args, w, h, min(w.begin + i, w.end - 1));
  Prepared now = prepare(args, h, ahead[0]);
  for (i64 t = w.begin; t < w.end;) {
#pragma unroll
    for (int i = 0; i < Config::stages; ++i, ++t) {
      if (t == w.end) break;
      ahead[i] = load_token(args, w, h, min(t + Config::stages, w.end - 1));
      const Prepared next = prepare(args, h, ahead[(i + 1) % Config::stages]);
      advance(args, w, h, now, t, state);
      now = next;
    }
  }
}

} // namespace kda

KDA_KERNEL(kda::Config::scan_warps * 32, 1) kda_recurrent(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  const i64 unit = static_cast<i64>(block_index_x()) * Config::scan_warps + warp_index();
  if (unit >= work_units(args, true)) return;
  const Work w = find_work(args, unit);
  if (w.sequence == args.sequences) return zero_output(args, w);
  const Places places = find_places(args, w);
  if (!places.runs) return zero_output(args, w);
  float state[kRows][kChannels];
  load_state(args.initial_state, places.read, w, state);
  // Keeps ptxas from moving the long state loads behind the token's arithmetic.
  sync_warp();
  const Head head = load_head(args, w);
  if constexpr (Config::tree)
    scan_tree(args, w, head, places.read, state);
  else if constexpr (Config::stages > 1)
    scan_pipelined(args, w, head, state);
  else
    scan_plain(args, w, head, state);
  if constexpr (!Config::every_state) store_state(args.final_state, places.write, w, state);
}
