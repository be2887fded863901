#pragma once
// What the asynchronous units of one CTA have in hand: mbarriers, bulk copies, wgmma groups.
#include "device.h"
#include "shadow.h"
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace kda::emulator {

struct Mbarrier {
  int arrivals = 0, pending = 0;
  long bytes = 0; ///< expected and not yet come
  unsigned phase = 0;
  // Checked: who loads to it, what the arrivals bring, and what completed phases brought.
  int loads = 0;
  int initialiser = 0;  ///< thread
  bool visible = false; ///< to the asynchronous proxy: fenced since it was initialised
  Gathering gathering;
  SharedClock completed;
};
struct PendingBulk {
  BulkCopy copy;
  TensorMapFields map; ///< a copy: the kernel's parameter lies on a stack that may be gone
  int thread, group;
};
struct PendingWgmma {
  WgmmaArguments arguments[128];
  std::vector<float> d; ///< [64][n] when it was issued; empty: the one before in the queue has it
  int group;
};
struct Warpgroup {
  GroupOperation operation = GroupOperation::fence;
  int arrived = 0, groups = 0;
  bool fenced = false; ///< ever
  void* arguments[128] = {};
  std::vector<PendingWgmma> queue;
};
/// The shared memory of the CTA.
struct SharedView {
  unsigned char* data;
  std::size_t bytes;
};

/// Empty, or what is wrong with the copy: alignment, bounds, a box that does not fit its swizzle.
[[nodiscard]] std::string check(const BulkCopy& copy, const TensorMapFields& map, const SharedView& shared);
/// Bytes that a copy to shared memory counts at its mbarrier.
[[nodiscard]] long counted_bytes(const PendingBulk& bulk);
void run(const PendingBulk& bulk, const SharedView& shared);
/// The bytes of global memory that it touches, a piece a call.
void each_global(const PendingBulk& bulk, const std::function<void(unsigned char*, std::size_t)>& visit);

/// Reads the accumulators [64][n] of 128 threads; `write` spreads them.
[[nodiscard]] std::vector<float> read_accumulators(const WgmmaArguments* arguments);
void write_accumulators(const WgmmaArguments* arguments, const std::vector<float>& d);
/// d = (accumulate ? d : 0) +- a b. Empty, or what is wrong.
[[nodiscard]] std::string run(const WgmmaArguments* arguments, std::vector<float>& d,
                              const SharedView& shared);
/// The elements of shared memory that it reads: byte and size.
void each_operand(const WgmmaArguments* arguments,
                  const std::function<void(std::size_t, std::size_t)>& visit);

} // namespace kda::emulator
