// The recurrence token by token, in fp32, the state in registers. The decode form, and the device reference
// that the tuner checks every other kernel against.
//
// A warp owns Config::rows rows (of V) of one state: they never depend on each other, so no warp ever waits
// for another. K lies across the lanes. Per token and row: S' = d S, then a = k.S' and b = q.S' in one
// reduction, u = beta (v - a), S = S' + k u, and o = b + (q.k) u, which needs no second reduction after the
// update.
#include "kernel_args.cuh"
#include "primitives/vote.cuh"
#include "stages/gate.cuh"
#include "stages/token_load.cuh"

namespace kda {

using Element = Config::Element;
using Gate = Config::Gate;
using Beta = Config::Beta;
using State = Config::State;
using Spread = RowSpread<Config::K>;

constexpr int kLanes = Spread::lanes;
constexpr int kChannels = Spread::elements;        // of K, held by a lane
constexpr int kRows = Config::rows / Spread::rows; // of V, held by a lane
constexpr int kTiles = (Config::V + Config::rows - 1) / Config::rows;
static_assert(kRows >= 1 && (kRows & (kRows - 1)) == 0);
// The reduction leaves kSlots of its 2 * kRows sums in a lane, the same ones in kSpan neighbouring lanes: a
// of some rows in the lower half of the lanes of a row, b of the same rows in the upper half.
constexpr int kSlots = 2 * kRows > kLanes ? 2 * kRows / kLanes : 1;
constexpr int kSpan = 2 * kRows < kLanes ? kLanes / (2 * kRows) : 1;

/// What a warp works on.
struct Work {
  i64 sequence, batch, begin, end; ///< tokens [begin, end) of batch row `batch`
  int value_head;
  int lane, part; ///< lane of a row of K; which of Spread::rows
  int row;        ///< first V row of this lane
  int sum_row;    ///< first V row whose sums this lane gets
};

KDA_DEVICE Work find_work(const KernelArgs& args, i64 unit) {
  Work w;
  const int tile = static_cast<int>(unit % kTiles);
  unit /= kTiles;
  w.value_head = static_cast<int>(unit % args.value_heads);
  w.sequence = unit / args.value_heads;
  w.lane = lane_index() % kLanes;
  w.part = lane_index() / kLanes;
  w.row = tile * Config::rows + w.part * kRows;
  w.sum_row = w.row + w.lane % (kLanes / 2) / kSpan * kSlots;
  if constexpr (Config::varlen) {
    // The sequence after the last one is the padding behind the packed tokens.
    const auto* cu = static_cast<const Config::Index*>(args.cu_seqlens);
    w.batch = 0;
    w.begin = cu[w.sequence];
    w.end = w.sequence < args.sequences ? static_cast<i64>(cu[w.sequence + 1]) : args.tokens;
  } else {
    w.batch = w.sequence;
    w.begin = 0;
    w.end = args.tokens;
  }
  return w;
}

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

/// Which states of the two tensors a sequence reads and writes.
struct Places {
  i64 read, write; ///< write: kNowhere when nothing is kept
  bool runs;       ///< false: padding or refused, o is 0 and no state is touched
};
constexpr i64 kNowhere = -1;

KDA_DEVICE bool is_padding(const KernelArgs& args, i64 slot) {
  return ((args.padding & kSkipNegative) != 0 && slot < 0) || ((args.padding & kSkipZero) != 0 && slot == 0);
}
KDA_DEVICE i64 number_of(const NumberTable& table, i64 sequence) {
  const i64 at = sequence * table.stride_sequence;
  return table.wide != 0 ? static_cast<const i64*>(table.data)[at] : static_cast<const int*>(table.data)[at];
}
KDA_DEVICE bool outside(i64 slot, i64 slots) {
  return static_cast<u64>(slot) >= static_cast<u64>(slots);
}

KDA_DEVICE Places find_places(const KernelArgs& args, const Work& w) {
  if constexpr (Config::pool) {
    const bool reads = args.initial_state.data != nullptr, writes = args.final_state.data != nullptr;
    const i64 read = reads ? number_of(args.read_slots, w.sequence) : kNowhere;
    const i64 write = writes ? number_of(args.write_slots, w.sequence) : kNowhere;
    if ((reads && is_padding(args, read)) || (!reads && writes && is_padding(args, write)))
      return {0, kNowhere, false};
    const bool keeps = writes && !is_padding(args, write);
    if ((reads && outside(read, args.read_pool)) || (keeps && outside(write, args.write_pool))) {
      const bool reports = w.value_head == 0 && w.row == 0 && lane_index() == 0; // one of all its warps
      if (reports && args.slot_error != nullptr)
        atomic_max(args.slot_error, static_cast<int>(w.sequence) + 1);
      return {0, kNowhere, false};
    }
    return {read, keeps ? write : kNowhere, true};
  } else {
    return {w.sequence, w.sequence, true};
  }
}

KDA_DEVICE i64 state_offset(const StateTensor& state, i64 place, const Work& w) {
  return place * state.stride_sequence + w.value_head * state.stride_head;
}

KDA_DEVICE void load_state(const StateTensor& tensor, i64 place, const Work& w,
                           float (&state)[kRows][kChannels]) {
  const State* base = static_cast<const State*>(tensor.data);
  const bool present = base != nullptr;
  if (present) base += state_offset(tensor, place, w);
#pragma unroll
  for (int j = 0; j < Spread::groups; ++j) {
    const int channel = Spread::channel(w.lane, j);
    const bool valid = present && Spread::valid(w.lane, j);
    if constexpr (Config::state_v_k) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        widen<State>(load_raw(base + (w.row + r) * Config::K + channel, valid && w.row + r < Config::V),
                     state[r] + 4 * j);
    } else if constexpr (kRows % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int r = 0; r < kRows; r += 4) {
          float x[4];
          widen<State>(load_raw(base + (channel + i) * Config::V + w.row + r, valid && w.row + r < Config::V),
                       x);
#pragma unroll
          for (int n = 0; n < 4; ++n)
            state[r + n][4 * j + i] = x[n];
        }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          state[r][4 * j + i] =
              valid && w.row + r < Config::V ? to_float(base[(channel + i) * Config::V + w.row + r]) : 0.f;
    }
  }
}

KDA_DEVICE void store_state(const StateTensor& tensor, i64 place, const Work& w,
                            const float (&state)[kRows][kChannels]) {
  if (tensor.data == nullptr || place == kNowhere) return;
  State* base = static_cast<State*>(tensor.data) + state_offset(tensor, place, w);
#pragma unroll
  for (int j = 0; j < Spread::groups; ++j) {
    if (!Spread::valid(w.lane, j)) continue;
    const int channel = Spread::channel(w.lane, j);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (w.row + r >= Config::V) continue;
      if constexpr (Config::state_v_k) {
        store4(base + (w.row + r) * Config::K + channel, state[r] + 4 * j);
      } else if constexpr (kRows % 4 == 0) {
        if (r % 4 != 0) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x[4] = {state[r][4 * j + i], state[r + 1][4 * j + i], state[r + 2][4 * j + i],
                              state[r + 3][4 * j + i]};
          store4(base + (channel + i) * Config::V + w.row + r, x);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          base[(channel + i) * Config::V + w.row + r] = from_float<State>(state[r][4 * j + i]);
      }
    }
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

/// Advances the state by one token and writes o.
KDA_DEVICE void step(float (&state)[kRows][kChannels], const Prepared& x, const Work& w, Element* o) {
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
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float row_u = shuffle(u[r % kSlots], w.part * kLanes + r / kSlots * kSpan);
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      state[r][c] = fma(x.k[c], row_u, state[r][c]);
  }
}

/// Few tokens: one after the other.
KDA_DEVICE void scan_plain(const KernelArgs& args, const Work& w, const Head& h,
                           float (&state)[kRows][kChannels]) {
  for (i64 t = w.begin; t < w.end; ++t)
    step(state, prepare(args, h, load_token(args, w, h, t)), w, h.o + t * args.o.stride_token);
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
      step(state, now, w, h.o + t * args.o.stride_token);
      now = next;
    }
  }
}

} // namespace kda

KDA_KERNEL(kda::Config::scan_warps * 32, 1) kda_recurrent(KDA_GRID_CONSTANT kda::KernelArgs args) {
  using namespace kda;
  const i64 unit = static_cast<i64>(block_index_x()) * Config::scan_warps + warp_index();
  const i64 units = (args.sequences + (Config::varlen ? 1LL : 0LL)) * args.value_heads * kTiles;
  if (unit >= units) return;
  const Work w = find_work(args, unit);
  if (w.sequence == args.sequences) return zero_output(args, w);
  const Places places = find_places(args, w);
  if (!places.runs) return zero_output(args, w);
  float state[kRows][kChannels];
  load_state(args.initial_state, places.read, w, state);
  // Keeps ptxas from moving the long state loads behind the token's arithmetic.
  sync_warp();
  const Head head = load_head(args, w);
  if constexpr (Config::stages > 1)
    scan_pipelined(args, w, head, state);
  else
    scan_plain(args, w, head, state);
  store_state(args.final_state, places.write, w, state);
}
