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

// Config::chunk: how many tokens the warps of a CTA prepare together in shared memory, one after the other in
// turn; 0: each warp prepares every token for itself, K spread as in the state.
constexpr bool kShared = Config::chunk > 0;
static_assert(!kShared || kTiles % Config::scan_warps == 0, "every warp of a CTA comes to its barriers");
static_assert(!kShared || Config::chunk >= Config::scan_warps,
              "every warp has a token's place to begin with");
using TokenSpread = RowSpread<Config::K, kShared ? 0 : Config::lanes>;
constexpr int kTokenChannels = TokenSpread::elements;
constexpr int kCtaRows = Config::scan_warps * Config::rows;
constexpr int kValues = kShared ? (kCtaRows + 31) / 32 : kSlots; ///< of v, that a lane loads

/// Zeros this warp's rows of o.
KDA_DEVICE void zero_output(const KernelArgs& args, const Work& w) {
  const i64 first = w.row - w.part * kRows;
#pragma unroll 1
  for (i64 i = lane_index(); i < (w.end - w.begin) * Config::rows; i += 32) {
    const i64 row = first + i % Config::rows;
    if (row < Config::V)
      row_of<Element>(args.o, w.batch, w.begin + i / Config::rows, w.value_head)[row] =
          from_float<Element>(0.f);
  }
}

/// What the tokens of a value head share.
struct Head {
  float a_log, bias[kTokenChannels];
};

KDA_DEVICE Head load_head(const KernelArgs& args, const Work& w) {
  Head h;
  h.a_log = 0.f;
  if constexpr (kReadsA) h.a_log = args.A_log[w.value_head];
#pragma unroll
  for (int c = 0; c < kTokenChannels; ++c)
    h.bias[c] = 0.f;
  if constexpr (Config::dt_bias)
    load_row<Config::K, TokenSpread::lanes>(args.dt_bias + w.value_head * Config::K,
                                            lane_index() % TokenSpread::lanes, h.bias);
  return h;
}

/// A token as it lies in memory.
struct Token {
  Raw4<Element> q[TokenSpread::groups], k[TokenSpread::groups];
  Raw4<Gate> g[TokenSpread::groups];
  Element v[kValues];
  Beta beta;
};

/// The row of V that value `i` of a token belongs to.
KDA_DEVICE int value_row(const Work& w, int i) {
  const int row = kShared ? w.cta_row + lane_index() + 32 * i : w.sum_row + i;
  return kWholeTiles && (!kShared || kCtaRows % 32 == 0) ? row : min(row, Config::V - 1);
}

KDA_DEVICE Token load_token(const KernelArgs& args, const Work& w, i64 t) {
  const u32 head = w.value_head / Config::group;
  const Element* const q = row_of<const Element>(args.q, w.batch, t, head);
  const Element* const k = row_of<const Element>(args.k, w.batch, t, head);
  const Element* const v = row_of<const Element>(args.v, w.batch, t, w.value_head);
  const Gate* const g = row_of<const Gate>(args.g, w.batch, t, w.value_head);
  Token x;
  const int lane = lane_index() % TokenSpread::lanes;
#pragma unroll
  for (int j = 0; j < TokenSpread::groups; ++j) {
    const int channel = TokenSpread::channel(lane, j);
    const bool valid = TokenSpread::valid(lane, j);
    x.q[j] = load_raw(q + channel, valid);
    x.k[j] = load_raw(k + channel, valid);
    x.g[j] = load_raw(g + channel, valid);
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    x.v[i] = v[value_row(w, i)];
  x.beta = *row_of<const Beta>(args.beta, w.batch, t, w.value_head);
  return x;
}

/// A token as the recurrence needs it: q and k normalised, q scaled. None of it depends on the state.
template <int channels, int values>
struct Prepared {
  float q[channels], k[channels], decay[channels];
  float v[values], beta, qk;
};
using Step = Prepared<kChannels, kSlots>;
// The forms of the scan are templates of that type: those that a kernel does not use are not instantiated.

/// Sum over the lanes of a token's row, the same bits in each.
KDA_DEVICE float row_sum(float x) {
#pragma unroll
  for (int mask = TokenSpread::lanes / 2; mask; mask >>= 1)
    x += shuffle_xor(x, mask);
  return x;
}

KDA_DEVICE Prepared<kTokenChannels, kValues> prepare(const KernelArgs& args, const Head& h,
                                                     const Token& token) {
  Prepared<kTokenChannels, kValues> x;
  const float a = kReadsA ? exp_clamped(h.a_log) : 1.f;
  float g[kTokenChannels], qq = 0.f, kk = 0.f, qk = 0.f;
#pragma unroll
  for (int j = 0; j < TokenSpread::groups; ++j) {
    widen<Element>(token.q[j], x.q + 4 * j);
    widen<Element>(token.k[j], x.k + 4 * j);
    widen<Gate>(token.g[j], g + 4 * j);
  }
#pragma unroll
  for (int c = 0; c < kTokenChannels; ++c) {
    x.decay[c] = exp2_fast(gate_log2(g[c], h.bias[c], a, args.lower_bound));
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
  for (int c = 0; c < kTokenChannels; ++c) {
    x.q[c] *= q_factor;
    x.k[c] *= k_factor;
  }
  x.qk = row_sum(qk) * q_factor * k_factor;
  x.beta = beta_value(to_float(token.beta));
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    x.v[i] = to_float(token.v[i]);
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
KDA_DEVICE void step(float (&state)[kRows][kChannels], const Step& x, const Work& w, Element* o,
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
    if (writes && is_row(w.sum_row + s)) o[w.sum_row + s] = from_float<Element>(value);
    if constexpr (Config::updates)
      if (w.lane < kLanes / 2 && w.lane % kSpan == 0 && is_row(w.sum_row + s)) kept_u[w.sum_row + s] = u[s];
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
KDA_DEVICE void keep_update(const KernelArgs& args, const Work& w, const Step& x, i64 t) {
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
KDA_DEVICE void advance(const KernelArgs& args, const Work& w, const Step& x, i64 t,
                        float (&state)[kRows][kChannels]) {
  const Work now = later(w);
  step(state, x, w, row_of<Element>(args.o, now.batch, t, now.value_head), kept_u(args, now, t));
  if constexpr (Config::updates) keep_update(args, w, x, t);
  if constexpr (Config::every_state) {
    const i64 place = place_after(args, w, t);
    if (place != kNowhere) store_state(args.final_state, place, w, state);
  }
  if constexpr (Config::interior_states) {
    const i64 slot = interior_slot(args, w.sequence, t + 1 - w.begin);
    if (slot != kNowhere) store_state(args.interior_states, slot, w, state);
  }
}

/// Few tokens: one after the other. `first` is token w.begin.
template <class Step>
KDA_DEVICE void scan_plain(const KernelArgs& args, const Work& w, const Head& h, const Token& first,
                           const LoadedState& loaded, float (&state)[kRows][kChannels]) {
  Step x = prepare(args, h, first); // before the state is waited for
  widen_state(loaded, state);
#pragma unroll 1
  for (i64 t = w.begin;;) {
    advance(args, w, x, t, state);
    if (++t == w.end) break;
    x = prepare(args, h, load_token(args, later(w), t));
  }
}

/// A prepared token in shared memory, in floats: q, k, decay, v of the CTA's rows, q.k, beta.
struct SharedToken {
  static constexpr int v = 3 * Config::K, scalars = v + (kCtaRows + 3) / 4 * 4, floats = scalars + 4;
};

KDA_DEVICE void share(const Prepared<kTokenChannels, kValues>& x, float* to) {
  const int lane = lane_index() % TokenSpread::lanes;
  if (lane_index() < TokenSpread::lanes) {
#pragma unroll
    for (int j = 0; j < TokenSpread::groups; ++j) {
      const int channel = TokenSpread::channel(lane, j);
      if (!TokenSpread::valid(lane, j)) continue;
      store4(to + channel, x.q + 4 * j);
      store4(to + Config::K + channel, x.k + 4 * j);
      store4(to + 2 * Config::K + channel, x.decay + 4 * j);
    }
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    if (kCtaRows % 32 == 0 || lane_index() + 32 * i < kCtaRows)
      to[SharedToken::v + lane_index() + 32 * i] = x.v[i];
  if (lane_index() == 0) {
    to[SharedToken::scalars] = x.qk;
    to[SharedToken::scalars + 1] = x.beta;
  }
}

KDA_DEVICE Step shared_step(const Work& w, const float* from) {
  Step x;
  load_row<Config::K, kLanes>(from, w.lane, x.q);
  load_row<Config::K, kLanes>(from + Config::K, w.lane, x.k);
  load_row<Config::K, kLanes>(from + 2 * Config::K, w.lane, x.decay);
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
    x.v[s] = from[SharedToken::v + w.sum_row - w.cta_row + s];
  x.qk = from[SharedToken::scalars];
  x.beta = from[SharedToken::scalars + 1];
  return x;
}

/// The warps of a CTA prepare Config::chunk tokens, one each in turn, and all of them use them. `first` is
/// this warp's first token.
template <class Step>
KDA_DEVICE void scan_shared(const KernelArgs& args, const Work& w, const Head& h, const Token& first,
                            const LoadedState& loaded, float (&state)[kRows][kChannels]) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int warp = warp_index();
  if (w.begin + warp < w.end) share(prepare(args, h, first), shared + warp * SharedToken::floats);
  widen_state(loaded, state);
  for (i64 begin = w.begin; begin < w.end; begin += Config::chunk) {
    const int count = static_cast<int>(min(w.end - begin, i64{Config::chunk}));
    if (begin > w.begin) sync_block(); // the tokens before have been read
    for (int i = begin > w.begin ? warp : warp + Config::scan_warps; i < count; i += Config::scan_warps)
      share(prepare(args, h, load_token(args, later(w), begin + i)), shared + i * SharedToken::floats);
    sync_block();
    for (int i = 0; i < count; ++i)
      advance(args, w, shared_step(w, shared + i * SharedToken::floats), begin + i, state);
  }
}

/// A tree of tokens: one whose parent is not the token before it starts again from the initial state, to
/// which the updates on the way to the parent are applied.
template <class Step>
KDA_DEVICE void scan_tree(const KernelArgs& args, const Work& w, const Head& h, i64 read,
                          const LoadedState& loaded, float (&state)[kRows][kChannels]) {
  widen_state(loaded, state);
  for (i64 t = w.begin; t < w.end; ++t) {
    const i64 parent = parent_of(args, w, t - w.begin);
    if (w.begin + parent != t - 1) {
      sync_warp(); // other lanes have written u
      widen_state(load_state(args, read, w, has_start(args, w)), state);
      const u64 path = path_to(args, w, parent);
      for (i64 i = 0; i <= parent; ++i) {
        if ((path >> i & 1) == 0) continue;
        const Step x = prepare(args, h, load_token(args, w, w.begin + i));
        apply_update(w, x.k, x.decay, kept_u(args, w, w.begin + i), state);
      }
    }
    const Step x = prepare(args, h, load_token(args, w, t));
    advance(args, w, x, t, state);
  }
}

/// Many tokens: loads run Config::stages tokens ahead and the next token is prepared during the step, so that
/// only the chain through the state is left to wait for.
template <class Step>
KDA_DEVICE void scan_pipelined(const KernelArgs& args, const Work& w, const Head& h,
                               const LoadedState& loaded, float (&state)[kRows][kChannels]) {
  widen_state(loaded, state);
  if (w.begin >= w.end) return;
  Token ahead[Config::stages];
#pragma unroll
  for (int i = 0; i < Config::stages; ++i)
    ahead[i] = load_token(args, w, min(w.begin + i, w.end - 1));
  Step now = prepare(args, h, ahead[0]);
  for (i64 t = w.begin; t < w.end;) {
#pragma unroll
    for (int i = 0; i < Config::stages; ++i, ++t) {
      if (t == w.end) break;
      ahead[i] = load_token(args, w, min(t + Config::stages, w.end - 1));
      const Step next = prepare(args, h, ahead[(i + 1) % Config::stages]);
      advance(args, w, now, t, state);
      now = next;
    }
  }
}

/// So many registers are enough for few tokens; with more, ptxas keeps what the second token needs.
constexpr int kRegisters = 64 + kRows * kChannels;
constexpr int kCtasPerSm = Config::stages > 1 || Config::tree || kRegisters > 192
                               ? 1
                               : 65536 / (32 * Config::scan_warps * kRegisters);

/// A sequence without tokens.
KDA_DEVICE void copy_state(const KernelArgs& args, const Work& w, const Numbers& numbers) {
  const Places places = find_places(args, w, numbers);
  if (!places.runs || Config::every_state || places.write == kNowhere) return;
  float state[kRows][kChannels];
  widen_state(load_state(args, places.read, w, has_start(args, w)), state);
  store_state(args.final_state, places.write, w, state);
}

} // namespace kda

KDA_KERNEL(kda::Config::scan_warps * 32, kda::kCtasPerSm)
kda_recurrent(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  begin_kernel();
  const Work w = find_work(args);
  if (w.idle) return;
  if (Config::varlen && w.sequence == static_cast<u32>(args.sequences)) return zero_output(args, w);
  const Numbers numbers = load_numbers(args, w);
  if (w.begin >= w.end) return copy_state(args, w, numbers);
  // One wait for the slot numbers and the first token, then the state is on its way: only after that is
  // anything judged or computed.
  const Head head = load_head(args, w);
  const Token first = load_token(args, w, kShared ? kda::min(w.begin + warp_index(), w.end - 1) : w.begin);
  const i64 read = numbers.read(args, w);
  const LoadedState loaded = load_state(args, read, w, is_readable(args, w, numbers, read));
  sync_warp(); // or ptxas moves half of the state's loads behind the arithmetic
  const Places places = find_places(args, w, numbers);
  if (!places.runs) return zero_output(args, w);
  float state[kRows][kChannels];
  if constexpr (Config::tree)
    scan_tree<Step>(args, w, head, places.read, loaded, state);
  else if constexpr (Config::stages > 1)
    scan_pipelined<Step>(args, w, head, loaded, state);
  else if constexpr (kShared)
    scan_shared<Step>(args, w, head, first, loaded, state);
  else
    scan_plain<Step>(args, w, head, first, loaded, state);
  if (!Config::every_state && places.write != kNowhere) store_state(args.final_state, places.write, w, state);
}
