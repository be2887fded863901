#pragma once
// The emulator as the option matrices run it: every access checked, in some order of threads, on each
// architecture in turn.
#include "emulator.h"

namespace kda::test {

inline emulator::Options checked(std::uint64_t row) {
  emulator::Options options;
  options.checked = true;
  options.optimize = 0; // most of the time is the compiler's
  options.arch = row % 2 == 0 ? "sm_90a" : "sm_80";
  options.seed = row / 2 % 4;
  options.copies = row / 8 % 2 == 0 ? emulator::Copies::late : emulator::Copies::early;
  return options;
}

} // namespace kda::test
