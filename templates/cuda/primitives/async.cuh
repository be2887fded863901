#pragma once
// cp.async (sm_80 and later): global to shared copies that complete at wait_copies. A barrier must follow the
// wait before other threads read.
#include "primitives/mma.cuh"

namespace kda {

/// 16 bytes, both addresses 16-byte aligned; zero-fills the destination when `valid` is false (source is not
/// read).
KDA_DEVICE void copy_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
KDA_DEVICE void copy_async_8(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
}
KDA_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most `pending` of this thread's committed groups are unfinished.
template <int pending>
KDA_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
/// The mbarrier counts one arrival of this thread when all its copies so far have come: instead of
/// commit_copies and wait_copies, for readers that wait for that phase. Use one way or the other in a kernel.
/// sm_90.
KDA_DEVICE void arrive_copies(u64* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

} // namespace kda
