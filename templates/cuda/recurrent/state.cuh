#pragma once
// States between memory and the registers of a warp.
#include "recurrent/work.cuh"

namespace kda {

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

/// What a token that is past does to a state: S <- diag(decay) S + k u^T, the same bits as `step` of
/// recurrent.cu. `u` points to V elements.
KDA_DEVICE void apply_update(const Work& w, const float (&k)[kChannels], const float (&decay)[kChannels],
                             const float* u, float (&state)[kRows][kChannels]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float row_u = w.row + r < Config::V ? u[w.row + r] : 0.f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      state[r][c] *= decay[c];
      state[r][c] = fma(k[c], row_u, state[r][c]);
    }
  }
}

} // namespace kda
