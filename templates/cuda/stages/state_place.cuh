#pragma once
// Where a warp's accumulators of S^T, 16 columns of V as rows, lie in a state matrix in memory.
#include "config.cuh"

namespace kda {

/// Offset of the accumulators [e], e = 0 or 2, of channels 8n..8n+7 in a state matrix, for a warp whose 16
/// columns of V begin at `column`; the next element is kStateStep further. False: padding.
KDA_DEVICE bool state_place(int column, int n, int e, int& offset) {
  const int v = column + (lane_index() >> 2) + e * 4;
  const int k = n * 8 + (lane_index() & 3) * 2;
  offset = Config::state_v_k ? v * Config::K + k : k * Config::V + v;
  return v < Config::V && k < Config::K;
}
constexpr int kStateStep = Config::state_v_k ? 1 : Config::V;

} // namespace kda
