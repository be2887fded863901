#pragma once
// The calls on a state pool that every backend must get right.
#include "pool.h"
#include <utility>

namespace kda::test {

/// Small decode calls: K=44, V=36, two value heads a head.
inline PoolCall pool_call(std::int64_t sequences, IndexType type = IndexType::int32,
                          PaddingPolicy padding = PaddingPolicy::none) {
  PoolCall c;
  Problem& p = c.options.problem;
  p.operation = Operation::recurrent;
  p.value_heads = 2;
  p.key_dim = 44;
  p.value_dim = 36;
  p.dtype = p.gate_dtype = p.beta_dtype = DType::fp32;
  p.gate = GateKind::softplus;
  p.qk_l2norm = p.beta_sigmoid = p.dt_bias = true;
  p.state_pool = true;
  c.type = type;
  c.padding = padding;
  c.options.batch = sequences;
  c.options.tokens = 1;
  return c;
}

/// Padding with which the emulator's checker can tell a slot number from memory that nobody wrote: words of
/// 0xFFFFFFFF. -1 itself is tried where nothing is checked.
constexpr std::int64_t kNobody = -7, kNobody64 = -(std::int64_t{1} << 40);

struct NamedPoolCall {
  const char* name;
  PoolCall call;
};

inline std::vector<NamedPoolCall> pool_calls() {
  std::vector<NamedPoolCall> all;
  const auto add = [&](const char* name, PoolCall c, std::vector<std::int64_t> read,
                       std::vector<std::int64_t> write) {
    c.read = std::move(read);
    c.write = std::move(write);
    all.push_back({name, std::move(c)});
  };
  add("in place, one token a row", pool_call(3), {4, 0, 2}, {4, 0, 2});
  add("in place, int64", pool_call(3, IndexType::int64), {5, 1, 2}, {5, 1, 2});
  add("read and write slots of their own", pool_call(3), {4, 0, 2}, {1, 3, 5});
  add("several sequences start from one slot", pool_call(3), {4, 4, 4}, {1, 3, 5});
  add("negative numbers are padding, as often as they like",
      pool_call(5, IndexType::int32, PaddingPolicy::negative), {kNobody, 3, kNobody, 0, kNobody},
      {kNobody, 3, 2, 0, 1});
  add("zero is padding", pool_call(4, IndexType::int64, PaddingPolicy::zero), {0, 3, 0, 1}, {0, 3, 2, 1});
  add("both are padding", pool_call(5, IndexType::int32, PaddingPolicy::both), {0, 3, kNobody, 1, 2},
      {0, 3, 4, 1, kNobody});
  add("a skipped write slot: o is computed, nothing is kept",
      pool_call(2, IndexType::int64, PaddingPolicy::negative), {3, 1}, {kNobody64, 1});
  add("without a policy a negative number is refused and 0 is a slot", pool_call(3), {kNobody, 0, 2},
      {kNobody, 0, 2});
  add("zero is padding, a negative number is refused", pool_call(3, IndexType::int32, PaddingPolicy::zero),
      {0, kNobody, 2}, {0, kNobody, 2});
  add("negative is padding, past the pool is refused",
      pool_call(4, IndexType::int32, PaddingPolicy::negative), {6, kNobody, 2, 1 << 30},
      {6, kNobody, 2, 1 << 30});
  add("int64 numbers are not cut to 32 bits", pool_call(3, IndexType::int64), {3, (1LL << 32) + 1, 2},
      {3, 1, 2});
  add("a write slot past the pool refuses the row", pool_call(3), {3, 1, 2}, {3, 6, 2});
  add("no initial state: fresh requests into slots that hold NaN",
      pool_call(4, IndexType::int32, PaddingPolicy::negative), {}, {3, kNobody, 9, 0});
  all.back().call.in_place = false;
  add("no final state", pool_call(3), {3, 7, 2}, {});
  PoolCall c = pool_call(3, IndexType::int32, PaddingPolicy::negative);
  c.in_place = false;
  c.table_stride = 3;
  c.gap = 64;
  add("two pools with gaps, slot numbers with a stride", c, {4, kNobody, 2}, {0, 3, 4});
  c = pool_call(0, IndexType::int64, PaddingPolicy::negative);
  c.options.problem.varlen = true;
  c.options.problem.cu_seqlens_type = IndexType::int32;
  c.options.lengths = {3, 0, 4, 1, 2, 0};
  c.options.padding = 2;
  c.gap = 16;
  add("packed: of several lengths, empty, padding, refused, rows behind the last", c,
      {3, 2, kNobody64, 11, 0, 4}, {3, 5, kNobody64, 1, 0, 9});
  c = pool_call(3, IndexType::int64, PaddingPolicy::both);
  c.options.problem.state_layout = StateLayout::v_k;
  c.options.problem.state_dtype = DType::bf16;
  c.options.tokens = 4;
  c.gap = 32;
  add("[V,K] in bf16, four tokens", c, {4, 0, 2}, {4, 0, 2});
  c.options.problem.dtype = c.options.problem.gate_dtype = c.options.problem.beta_dtype = DType::bf16;
  c.options.problem.state_layout = StateLayout::k_v;
  c.options.problem.state_dtype = DType::fp16;
  c.table_stride = 2;
  add("[K,V] in fp16, bf16 tensors", c, {1, kNobody64, 2}, {3, kNobody64, 4});
  return all;
}

} // namespace kda::test
