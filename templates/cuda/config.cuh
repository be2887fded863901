#pragma once
// Defaults that let a template compile alone. The emitter puts a generated file of this name in its place.
#include "primitives/basic.cuh"

namespace kda {

enum class GateKind { log_e, log2, softplus, bounded, bounded_no_a };

struct Config {
  using Element = bf16; ///< q, k, v, o and their gradients
  using Gate = bf16;    ///< g, dg
  using Beta = bf16;    ///< beta, dbeta
  using State = float;
  using Index = i64; ///< cu_seqlens
  static constexpr int K = 128, V = 128;
  static constexpr int group = 1; ///< value heads per query/key head
  static constexpr GateKind gate = GateKind::bounded;
  static constexpr bool dt_bias = true, beta_sigmoid = true, beta_times_two = false, qk_l2norm = true;
  static constexpr bool varlen = false;
  static constexpr bool backward = false;  ///< the operation is backward
  static constexpr bool state_v_k = false; ///< state [V, K]
  static constexpr bool pool = false;      ///< states lie in the slots of a pool
  static constexpr bool replay = false;    ///< the operation is replay
  static constexpr bool every_state = false, updates = false, tree = false,
                        interior_states = false; ///< as in Problem
  // tunables
  static constexpr int chunk = 64, value_tile = 32, prepare_warps = 4, scan_warps = 4, rows = 4, stages = 2;
  static constexpr int lanes = 0, segments = 0;
  static constexpr bool streaming = false, overlap = false;
  static constexpr bool slabs = false; ///< chunk backward: a call is walked in slabs
};

} // namespace kda
