#pragma once
// mbarrier (sm_90): 8 bytes of shared memory that count arrivals and bytes. Phase 0 is current after init; a
// phase completes when every arrival and every expected byte came. `parity` of a wait is the parity of the
// phase that must be complete: 0, 1, 0, ... for a consumer; a producer that finds its slots free at first
// starts with 1.
#include "primitives/mma.cuh"

namespace kda {

/// One thread, once; then fence_mbarrier_init and a block barrier before others use it.
KDA_DEVICE void mbarrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
KDA_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
KDA_DEVICE void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// Expects `bytes` of bulk copies in this phase, then arrives.
KDA_DEVICE void mbarrier_expect_arrive(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
/// Expects bytes without arriving.
KDA_DEVICE void mbarrier_expect(u64* barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
KDA_DEVICE bool mbarrier_test(u64* barrier, int parity) {
  u32 done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, "
               "p;\n}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}
KDA_DEVICE void mbarrier_wait(u64* barrier, int parity) {
  u32 done = 0;
  while (done == 0)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, "
                 "0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}

} // namespace kda
