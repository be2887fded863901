#pragma once
// States between memory and the registers of a warp, in groups of four elements: along K in [V,K], along V in
// [K,V].
#include "recurrent/places.cuh"

namespace kda {

static_assert(Config::state_v_k || kRows % 4 == 0, "[K,V] has groups of four rows");
constexpr int kStateGroups = kRows * kChannels / 4; ///< of a lane

/// A lane's part of a state as it lies in memory: converting would wait for the loads.
struct LoadedState {
  Raw4<State> x[kStateGroups];
};

/// Element `n` of group `i`. [V,K] has the groups of a lane's first row first, [K,V] those of its first four
/// rows.
template <class T>
KDA_DEVICE T& element(T (&state)[kRows][kChannels], int i, int n) {
  if constexpr (Config::state_v_k) return state[i / Spread::groups][i % Spread::groups * 4 + n];
  return state[i / kChannels * 4 + n][i % kChannels];
}
/// Where group `i` lies in the matrix, and whether the matrix has it.
KDA_DEVICE int group_offset(const Work& w, int i) {
  if constexpr (Config::state_v_k)
    return (w.row + i / Spread::groups) * Config::K + Spread::channel(w.lane, i % Spread::groups);
  const int c = i % kChannels;
  return (Spread::channel(w.lane, c / 4) + c % 4) * Config::V + w.row + i / kChannels * 4;
}
KDA_DEVICE bool has_group(const Work& w, int i) {
  if constexpr (Config::state_v_k)
    return is_row(w.row + i / Spread::groups) && Spread::valid(w.lane, i % Spread::groups);
  return is_row(w.row + i / kChannels * 4) && Spread::valid(w.lane, i % kChannels / 4);
}

KDA_DEVICE i64 state_offset(const StateTensor& state, i64 place, const Work& w) {
  return place * state.stride_sequence + w.value_head * state.stride_head;
}

/// Zeros where there is no state to start from.
KDA_DEVICE LoadedState load_state(const KernelArgs& args, i64 place, const Work& w, bool present) {
  const StateTensor& tensor = args.initial_state;
  LoadedState loaded = {};
  if (!present) return loaded;
  const State* const base = static_cast<const State*>(tensor.data) + state_offset(tensor, place, w);
#pragma unroll
  for (int i = 0; i < kStateGroups; ++i) {
    if (!has_group(w, i)) continue;
    const auto* const from = reinterpret_cast<const Raw4<State>*>(base + group_offset(w, i));
    if constexpr (Config::streaming)
      loaded.x[i] = load_streaming(from);
    else
      loaded.x[i] = *from;
  }
  return loaded;
}

KDA_DEVICE void widen_state(const LoadedState& loaded, float (&state)[kRows][kChannels]) {
#pragma unroll
  for (int i = 0; i < kStateGroups; ++i) {
    float x[4];
    widen<State>(loaded.x[i], x);
#pragma unroll
    for (int n = 0; n < 4; ++n)
      element(state, i, n) = x[n];
  }
}

KDA_DEVICE void store_state(const StateTensor& tensor, i64 place, const Work& w,
                            const float (&state)[kRows][kChannels]) {
  State* const base = static_cast<State*>(tensor.data) + state_offset(tensor, place, w);
#pragma unroll
  for (int i = 0; i < kStateGroups; ++i) {
    if (!has_group(w, i)) continue;
    float x[4];
#pragma unroll
    for (int n = 0; n < 4; ++n)
      x[n] = element(state, i, n);
    auto* const to = reinterpret_cast<Raw4<State>*>(base + group_offset(w, i));
    if constexpr (Config::streaming)
      store_streaming(to, pack4<State>(x));
    else
      *to = pack4<State>(x);
  }
}

/// What a token that is past does to a state: S <- diag(decay) S + k u^T, the same bits as `step` of
/// recurrent.cu. `u` points to V elements.
KDA_DEVICE void apply_update(const Work& w, const float (&k)[kChannels], const float (&decay)[kChannels],
                             const float* u, float (&state)[kRows][kChannels]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float row_u = is_row(w.row + r) ? u[w.row + r] : 0.f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      state[r][c] *= decay[c];
      state[r][c] = fma(k[c], row_u, state[r][c]);
    }
  }
}

} // namespace kda
