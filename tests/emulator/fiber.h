#pragma once
// Stacks of fibers and the switch between them.
#include "device.h"
#include <cstddef>
#include <vector>

namespace kda::emulator {

/// Stacks of one worker, kept from CTA to CTA. Each has kStackBytes, aligned to its size, with a guard page
/// at its end.
class Stacks {
public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();
  /// False when memory ran out.
  [[nodiscard]] bool reserve(std::size_t count);
  /// The stack pointer with which stack `i` starts `entry` as `thread`.
  [[nodiscard]] void* prepare(std::size_t i, Thread* thread, void (*entry)()) const;

private:
  std::vector<unsigned char*> stacks_;
};

/// Saves the callee-saved registers and the stack pointer to *save and goes on at `to`.
extern "C" void kda_switch_stack(void** save, void* to);

} // namespace kda::emulator
