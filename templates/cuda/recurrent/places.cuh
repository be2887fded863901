#pragma once
// Which states a sequence reads and writes: the slots of a pool, the accepted tokens and the parents of a
// tree, as Args of kda/engine.h describes them. All of it is read here, in the kernel, so that a replayed
// graph sees what the tables hold then; and all of it is checked before anything is written.
#include "primitives/vote.cuh"
#include "recurrent/work.cuh"

namespace kda {

struct Places {
  i64 read, write; ///< states; write: kNowhere when nothing is kept
  i64 steps;       ///< replay: 1 + the last token to apply
  bool runs;       ///< false: padding, a no-op or refused; no state is touched
};
constexpr i64 kNowhere = -1;
constexpr int kMostTreeTokens = 64; ///< bits of a path

KDA_DEVICE bool is_padding(const KernelArgs& args, i64 slot) {
  return ((args.padding & kSkipNegative) != 0 && slot < 0) || ((args.padding & kSkipZero) != 0 && slot == 0);
}
KDA_DEVICE i64 number_of(const NumberTable& table, i64 sequence, i64 column = 0) {
  const i64 at = sequence * table.stride_sequence + column * table.stride_column;
  return table.wide != 0 ? static_cast<const i64*>(table.data)[at] : static_cast<const int*>(table.data)[at];
}
KDA_DEVICE bool outside(i64 slot, i64 slots) {
  return static_cast<u64>(slot) >= static_cast<u64>(slots);
}

/// Raises the error word; of all warps of a sequence one does.
KDA_DEVICE Places refuse(const KernelArgs& args, const Work& w) {
  if (w.value_head == 0 && w.row == 0 && lane_index() == 0 && args.slot_error != nullptr)
    atomic_max(args.slot_error, static_cast<int>(w.sequence) + 1);
  return {0, kNowhere, 0, false};
}

/// Where the state after token `t` goes.
KDA_DEVICE i64 place_after(const KernelArgs& args, const Work& w, i64 t) {
  if (args.final_state.data == nullptr) return kNowhere;
  const i64 slot = number_of(args.write_slots, w.sequence, t - w.begin);
  return is_padding(args, slot) ? kNowhere : slot;
}

/// Some token's state has no slot to go to, or one that a branch would still read.
KDA_DEVICE bool writes_outside(const KernelArgs& args, const Work& w, i64 read) {
  const bool in_place = Config::tree && args.initial_state.data == args.final_state.data;
  if (w.end - w.begin > args.write_slots.columns) return true;
  for (i64 t = w.begin; t < w.end; ++t) {
    const i64 place = place_after(args, w, t);
    if (place != kNowhere && (outside(place, args.write_pool) || (in_place && place == read))) return true;
  }
  return false;
}

/// The token that token `i` of the sequence continues; -1: the initial state.
KDA_DEVICE i64 parent_of(const KernelArgs& args, const Work& w, i64 i) {
  const i64 parent = number_of(args.parents, w.sequence, i);
  return parent < 0 ? -1 : parent;
}
KDA_DEVICE bool is_tree(const KernelArgs& args, const Work& w) {
  const i64 tokens = w.end - w.begin;
  if (tokens > args.parents.columns || tokens > kMostTreeTokens) return false;
  for (i64 i = 0; i < tokens; ++i)
    if (parent_of(args, w, i) >= i) return false;
  return true;
}
/// The tokens from the root to `token`, a bit each; a parent stands before its children.
KDA_DEVICE u64 path_to(const KernelArgs& args, const Work& w, i64 token) {
  u64 path = 0;
  for (; token >= 0; token = parent_of(args, w, token))
    path |= u64{1} << token;
  return path;
}

KDA_DEVICE Places find_places(const KernelArgs& args, const Work& w) {
  const Places idle{0, kNowhere, 0, false};
  Places p{w.sequence, w.sequence, 0, true};
  i64 column = 0;
  if constexpr (Config::pool || Config::replay) {
    if (args.accepted.data != nullptr) {
      const i64 accepted = number_of(args.accepted, w.sequence);
      if (accepted == 0) return idle;
      const i64 most = Config::replay ? w.end - w.begin : args.read_slots.columns;
      if (accepted < 0 || accepted > most) return refuse(args, w);
      p.steps = accepted;
      if constexpr (!Config::replay) column = accepted - 1;
    }
  }
  if constexpr (Config::tree)
    if (!is_tree(args, w)) return refuse(args, w);
  if constexpr (Config::pool) {
    const bool reads = args.initial_state.data != nullptr, writes = args.final_state.data != nullptr;
    p.read = reads ? number_of(args.read_slots, w.sequence, column) : kNowhere;
    p.write = writes ? number_of(args.write_slots, w.sequence) : kNowhere;
    if (reads ? is_padding(args, p.read) : writes && is_padding(args, p.write)) return idle;
    if (!writes || is_padding(args, p.write)) p.write = kNowhere;
    if (reads && outside(p.read, args.read_pool)) return refuse(args, w);
    if constexpr (Config::every_state) {
      if (writes && writes_outside(args, w, p.read)) return refuse(args, w);
    } else {
      if (p.write != kNowhere && outside(p.write, args.write_pool)) return refuse(args, w);
    }
  }
  return p;
}

} // namespace kda
