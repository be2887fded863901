#pragma once
// The calls on a state pool that every backend must get right.
#include "pool.h"
#include <numeric>
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

/// Calls that verify drafts, and replays of what they keep.
inline std::vector<NamedPoolCall> verify_calls() {
  std::vector<NamedPoolCall> all;
  const auto add = [&](const char* name, PoolCall c, std::vector<std::int64_t> read,
                       std::vector<std::int64_t> write) {
    c.read = std::move(read);
    c.write = std::move(write);
    all.push_back({name, std::move(c)});
  };
  PoolCall c = pool_call(3, IndexType::int32, PaddingPolicy::negative);
  c.slots = 13;
  c.options.tokens = 4;
  c.options.problem.every_state = true;
  c.columns = c.read_columns = 4;
  c.accepted = {1, 4, 2};
  const std::vector<std::int64_t> table{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  add("every state: one table to read by accepted counts and to write, in place", c, table, table);
  c.column_major = true; // B19
  c.table_stride = 2;
  c.type = IndexType::int64;
  add("every state: the table by columns, with gaps", c, table, table);
  c.accepted = {0, 9, 3}; // B18: 9 of a table of 4
  add("accepted counts of 0, a no-op, and past the table, refused", c, table, table);
  c.accepted = {kNobody64, 4, 4};
  add("a negative accepted count is refused", c, table, table);
  c.accepted = {2, 1, 4};
  add("every state: padding in a row of the table keeps no state there", c, table,
      {0, kNobody64, 2, 3, kNobody64, 5, 6, 7, 8, 9, 10, kNobody64});
  add("every state: one slot past the pool refuses the row and nothing is written", c, table,
      {0, 1, 2, 3, 4, 5, 13, 7, 8, 9, 10, 11});
  c = pool_call(0, IndexType::int32, PaddingPolicy::none);
  c.slots = 13;
  c.options.problem.varlen = c.options.problem.every_state = true;
  c.options.lengths = {2, 0, 5, 4}; // B22, B23: fewer tokens than columns, more, as many
  c.columns = 4;
  c.in_place = false;
  add("packed: as many tokens as the table is wide or fewer; more are refused", c, {3, 1, 12, 5},
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 3, 5, 4});
  c.options.lengths = {1, 1, 1, 1, 1, 1, 1, 1}; // B26
  c.columns = 1;
  add("packed: sequences of one token without an initial state", c, {}, {7, 6, 5, 4, 3, 2, 1, 0});
  c.options.lengths = {4, 4, 4}; // B22
  c.columns = 4;
  add("packed: fresh requests of as many tokens as a verify has, every state", c, {},
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
  c.options.problem.every_state = false;
  c.columns = 1;
  add("packed: fresh requests of as many tokens as a verify has, the last state", c, {}, {2, 0, 1});

  c = pool_call(3, IndexType::int64, PaddingPolicy::both);
  c.options.tokens = 5;
  c.options.problem.updates = true;
  add("updates and no state; a padding row keeps none", c, {4, 0, 2}, {});
  c.options.problem.dtype = c.options.problem.beta_dtype = DType::bf16;
  c.options.problem.state_layout = StateLayout::v_k;
  c.options.problem.state_dtype = DType::bf16;
  add("updates and the last state", c, {4, 3, 2}, {4, 1, kNobody64});
  c.options.problem.updates = false;
  c.options.problem.operation = Operation::replay;
  c.accepted = {5, 2, 0};
  add("replay: all, some and none of the tokens", c, {4, 3, 2}, {4, 3, 2});
  c.options.problem.state_dtype = DType::fp32;
  c.accepted = {6, 1, kNobody64};
  add("replay: counts that cannot be are refused", c, {4, 3, 2}, {4, 3, 2});
  c.options.problem.state_layout = StateLayout::k_v;
  c.options.problem.varlen = true;
  c.options.lengths = {3, 0, 4};
  c.options.padding = 2;
  c.accepted = {3, 1, 2};
  c.in_place = false;
  add("replay of packed sequences, from one pool into another", c, {4, 3, 2}, {1, 2, 5});

  c = pool_call(4, IndexType::int64, PaddingPolicy::negative);
  c.slots = 24;
  c.options.tokens = 5;
  c.options.problem.tree = c.options.problem.updates = true;
  c.columns = 5;
  constexpr std::int64_t kRoot = kNobody64;
  c.parents = {kRoot, 0, 0, 1, 1, kRoot, kRoot, kRoot, 0, 3, kRoot, 0, 1, 2, 3, kRoot, 0, 2, 1, 1};
  add("a tree, two roots, a chain, and a parent that is not before its child", c, {20, 21, 22, 23}, {});
  c.options.problem.every_state = true;
  c.table_stride = 2;
  std::vector<std::int64_t> slots(20);
  std::iota(slots.begin(), slots.end(), 0);
  add("the states of a tree", c, {20, 21, 22, 23}, slots);
  slots[7] = 21;
  add("a state of a tree may not take the place that branches start from", c, {20, 21, 22, 23}, slots);
  c.options.problem.every_state = c.options.problem.updates = false;
  c.options.problem.operation = Operation::replay;
  c.table_stride = 1;
  c.accepted = {5, 5, 3, 1};
  c.options.problem.state_layout = StateLayout::v_k;
  add("replay of a path of a tree", c, {20, 21, 22, 23}, {20, 21, 22, 23});
  return all;
}

} // namespace kda::test
