#pragma once
// The option matrix of the token kernels, on every device and in both directions: rows of
// `pairwise(kOptionSizes)` become cases.
#include "random_case.h"
#include "run_case.h"
#include <array>
#include <vector>

namespace kda::test {

// One array an option; a row indexes them.
inline constexpr std::array<std::array<int, 2>, 6> kDims{
    {{128, 128}, {60, 100}, {100, 60}, {16, 256}, {196, 16}, {32, 36}}};
inline constexpr std::array kTypes{DType::bf16, DType::fp16, DType::fp32};
inline constexpr std::array kGates{GateKind::log_e, GateKind::log2, GateKind::softplus, GateKind::bounded,
                                   GateKind::bounded_no_a};
inline constexpr std::array kRegimes{Regime::fast, Regime::slow, Regime::unbounded, Regime::spikes};
inline constexpr std::array<std::array<int, 2>, 3> kHeads{{{1, 1}, {1, 3}, {2, 4}}};
enum Shape { fixed, one_token, no_token, packed_int32, packed_int64, shapes };

/// Columns: dims, four dtypes, layout, gate, dt_bias, beta, l2norm, heads, shape, initial state, strided,
/// optional outputs, regime, and which sixth of the variants.
inline const std::vector<int> kOptionSizes{6, 3, 3, 3, 3, 2, 5, 2, 3, 2, 3, shapes, 2, 2, 2, 4, 6};

inline void set_shape(CaseOptions& o, Shape shape) {
  switch (shape) {
  case fixed:
    o.batch = 2;
    o.tokens = 11;
    return;
  case one_token:
    o.batch = 3;
    o.tokens = 1;
    return;
  case no_token: o.tokens = 0; return;
  default: break;
  }
  o.problem.varlen = true;
  o.problem.cu_seqlens_type = shape == packed_int32 ? IndexType::int32 : IndexType::int64;
  o.lengths = {0, 9, 1, 0, 4};
  o.padding = shape == packed_int32 ? 5 : 0;
}

/// Layout, gate, dt_bias, beta, l2norm, heads, initial state and regime of a row: what every matrix spells
/// alike.
inline void set_flags(CaseOptions& o, const std::vector<int>& row) {
  const auto at = [&](std::size_t i) { return static_cast<std::size_t>(row[i]); };
  Problem& p = o.problem;
  p.state_layout = row[5] == 0 ? StateLayout::k_v : StateLayout::v_k;
  p.gate = kGates[at(6)];
  const bool precomputed = p.gate == GateKind::log_e || p.gate == GateKind::log2;
  p.dt_bias = row[7] == 1 && !precomputed;
  p.beta_sigmoid = row[8] > 0;
  p.beta_times_two = row[8] > 1;
  p.qk_l2norm = row[9] == 1;
  p.heads = kHeads[at(10)][0];
  p.value_heads = kHeads[at(10)][1];
  o.initial_state = row[12] == 1;
  o.regime = precomputed || row[15] < 3 ? kRegimes[at(15)] : Regime::fast;
}

inline CaseOptions case_of(const std::vector<int>& row, Operation operation, std::uint64_t seed) {
  const auto at = [&](std::size_t i) { return static_cast<std::size_t>(row[i]); };
  CaseOptions o;
  Problem& p = o.problem;
  p.operation = operation;
  p.key_dim = kDims[at(0)][0];
  p.value_dim = kDims[at(0)][1];
  p.dtype = kTypes[at(1)];
  p.gate_dtype = kTypes[at(2)];
  p.beta_dtype = kTypes[at(3)];
  p.state_dtype = kTypes[at(4)];
  set_flags(o, row);
  set_shape(o, static_cast<Shape>(row[11]));
  o.seed = seed;
  return o;
}
inline RunOptions run_of(const std::vector<int>& row) {
  return {row[13] == 1, row[14] == 1};
}
inline const Variant& variant_of(const std::vector<int>& row, const std::vector<Variant>& all) {
  return all[static_cast<std::size_t>(row[16]) * all.size() / 6];
}

} // namespace kda::test
