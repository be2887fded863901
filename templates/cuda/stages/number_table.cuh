#pragma once
// Numbers by sequence that the caller hands over, and what they say about states.
#include "config.cuh"
#include "kernel_args.cuh"

namespace kda {

constexpr i64 kNowhere = -1; ///< no slot

/// A number of a table as it lies in memory: converting would wait for it.
struct LoadedNumber {
  u32 low, high;
  KDA_DEVICE i64 value(const NumberTable& table) const {
    return table.wide != 0 ? static_cast<i64>(u64{high} << 32 | low) : i64{static_cast<int>(low)};
  }
};
KDA_DEVICE LoadedNumber load_number(const NumberTable& table, u32 sequence, i64 column, bool given) {
  const u32* const at = static_cast<const u32*>(table.data) +
                        ((sequence * table.stride_sequence + column * table.stride_column) << table.wide);
  LoadedNumber n = {};
  if (given) n = {at[0], at[table.wide]};
  return n;
}
KDA_DEVICE i64 number_of(const NumberTable& table, u32 sequence, i64 column) {
  return load_number(table, sequence, column, true).value(table);
}
KDA_DEVICE bool outside(i64 slot, i64 slots) {
  return static_cast<u64>(slot) >= static_cast<u64>(slots);
}

/// The sequence has a state to start from, and not zero.
KDA_DEVICE bool has_initial_state(const KernelArgs& args, u32 sequence) {
  return args.initial_state.data != nullptr &&
         (args.has_initial_state.data == nullptr || number_of(args.has_initial_state, sequence, 0) != 0);
}

/// The slot of the state after `tokens` tokens of the sequence, or kNowhere.
KDA_DEVICE i64 interior_slot(const KernelArgs& args, u32 sequence, i64 tokens) {
  const u32 count = static_cast<u32>(tokens), interval = static_cast<u32>(args.interior_interval);
  const u32 column = count / interval;
  if (args.interior_states.data == nullptr || count == 0 || count != column * interval ||
      column > static_cast<u32>(args.interior_slots.columns))
    return kNowhere;
  const i64 slot = number_of(args.interior_slots, sequence, column - 1);
  return outside(slot, args.interior_pool) ? kNowhere : slot;
}

} // namespace kda
