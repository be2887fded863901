#pragma once
// Which states a sequence reads and writes: the slots of a pool, the accepted tokens and the parents of a
// tree, as Args of kda/engine.h describes them. All of it is read here, in the kernel, so that a replayed
// graph sees what the tables hold then; and all of it is checked before anything is written.
#include "primitives/vote.cuh"
#include "recurrent/work.cuh"
#include "stages/number_table.cuh"

namespace kda {

struct Places {
  i64 read, write; ///< states; write: kNowhere when nothing is kept
  i64 steps;       ///< replay: 1 + the last token to apply
  bool runs;       ///< false: padding, a no-op or refused; no state is touched
};
constexpr int kMostTreeTokens = 64; ///< bits of a path

KDA_DEVICE bool is_padding(const KernelArgs& args, i64 slot) {
  return ((args.padding & kSkipNegative) != 0 && slot < 0) || ((args.padding & kSkipZero) != 0 && slot == 0);
}
/// Raises the error word; of all warps of a sequence one does.
KDA_DEVICE void raise_error(const KernelArgs& args, const Work& w) {
  if (w.value_head == 0 && w.row == 0 && lane_index() == 0 && args.slot_error != nullptr)
    atomic_max(args.slot_error, static_cast<int>(w.sequence) + 1);
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

/// What the tables say of a sequence, not yet judged, so that a kernel can load its first token before it
/// waits for them, and its state before it judges them.
struct Numbers {
  i64 accepted;
  LoadedNumber read_slot, write_slot;

  /// The state that the sequence starts from; it may lie outside the pool.
  KDA_DEVICE i64 read(const KernelArgs& args, const Work& w) const {
    return Config::pool ? read_slot.value(args.read_slots) : i64{w.sequence};
  }
  KDA_DEVICE i64 write(const KernelArgs& args, const Work& w) const {
    return Config::pool ? write_slot.value(args.write_slots) : i64{w.sequence};
  }
};
KDA_DEVICE Numbers load_numbers(const KernelArgs& args, const Work& w) {
  Numbers n = {1, {}, {}};
  i64 column = 0;
  if constexpr (Config::pool || Config::replay)
    if (args.accepted.data != nullptr) {
      n.accepted = number_of(args.accepted, w.sequence, 0);
      if (!Config::replay && n.accepted > 0) column = min(n.accepted, i64{args.read_slots.columns}) - 1;
    }
  if constexpr (Config::pool) {
    n.read_slot = load_number(args.read_slots, w.sequence, column, args.initial_state.data != nullptr);
    n.write_slot = load_number(args.write_slots, w.sequence, 0, args.final_state.data != nullptr);
  }
  return n;
}

/// There is a state to start from.
KDA_DEVICE bool has_start(const KernelArgs& args, const Work& w) {
  return Config::pool || Config::replay ? args.initial_state.data != nullptr
                                        : has_initial_state(args, w.sequence);
}
/// The sequence may start from `read`, as far as that alone tells: reading it is harmless.
KDA_DEVICE bool is_readable(const KernelArgs& args, const Work& w, const Numbers& n, i64 read) {
  if (!has_start(args, w) || n.accepted < 1) return false;
  return !Config::pool || !(is_padding(args, read) || outside(read, args.read_pool));
}

KDA_DEVICE Places find_places(const KernelArgs& args, const Work& w, const Numbers& n) {
  const bool reads = args.initial_state.data != nullptr, writes = args.final_state.data != nullptr;
  Places p{n.read(args, w), writes ? n.write(args, w) : kNowhere, n.accepted, true};
  bool idle = false, refused = false;
  if constexpr (Config::pool || Config::replay)
    if (args.accepted.data != nullptr) {
      const i64 most = Config::replay ? w.end - w.begin : args.read_slots.columns;
      idle = n.accepted == 0;
      refused = n.accepted < 0 || n.accepted > most;
    }
  if constexpr (Config::tree) refused = refused || (!idle && !is_tree(args, w));
  if constexpr (Config::pool) {
    const bool skips_write = writes && is_padding(args, p.write);
    idle = idle || (!refused && (reads ? is_padding(args, p.read) : skips_write));
    refused = refused || (reads && outside(p.read, args.read_pool));
    if (skips_write) p.write = kNowhere;
    if constexpr (Config::every_state)
      refused = refused || (!idle && writes && writes_outside(args, w, p.read));
    else
      refused = refused || (writes && !skips_write && outside(p.write, args.write_pool));
  }
  p.runs = !idle && !refused;
  if (refused && !idle) raise_error(args, w);
  return p;
}

} // namespace kda
