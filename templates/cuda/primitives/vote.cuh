#pragma once
// Votes of a warp, atomics, and barriers that a thread passes without waiting.
#include "primitives/basic.cuh"

namespace kda {

/// Bit l: what lane l says. All 32 lanes call it.
KDA_DEVICE u32 vote_ballot(bool x) {
  return __ballot_sync(0xffffffffu, x);
}
KDA_DEVICE bool vote_any(bool x) {
  return __any_sync(0xffffffffu, x) != 0;
}
KDA_DEVICE bool vote_all(bool x) {
  return __all_sync(0xffffffffu, x) != 0;
}

/// The value before the addition; shared or global memory. Relaxed: orders no other access.
KDA_DEVICE u32 atomic_add(u32* to, u32 value) {
  return atomicAdd(to, value);
}
KDA_DEVICE float atomic_add(float* to, float value) {
  return atomicAdd(to, value);
}
KDA_DEVICE int atomic_max(int* to, int value) {
  return atomicMax(to, value);
}

/// Arrives at barrier `id`, where `threads` threads come together, and goes on: the counterpart of
/// sync_named.
KDA_DEVICE void arrive_named(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

} // namespace kda
