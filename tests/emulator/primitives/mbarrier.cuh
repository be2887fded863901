#pragma once
// Host version of templates/cuda/primitives/mbarrier.cuh. The barrier's state is the emulator's; its 8 bytes
// are the name.
#include "primitives/mma.cuh"

namespace kda {

KDA_DEVICE bool mbarrier_do(emulator::MbarrierOperation operation, u64* barrier, int value) {
  return emulator::current().services->mbarrier(operation, barrier, static_cast<u32>(value));
}
KDA_DEVICE void mbarrier_init(u64* barrier, int arrivals) {
  mbarrier_do(emulator::MbarrierOperation::init, barrier, arrivals);
}
KDA_DEVICE void fence_mbarrier_init() {
  emulator::current().services->fence_mbarrier_init();
}
KDA_DEVICE void mbarrier_arrive(u64* barrier) {
  mbarrier_do(emulator::MbarrierOperation::arrive, barrier, 0);
}
KDA_DEVICE void mbarrier_expect_arrive(u64* barrier, int bytes) {
  mbarrier_do(emulator::MbarrierOperation::expect_arrive, barrier, bytes);
}
KDA_DEVICE void mbarrier_expect(u64* barrier, int bytes) {
  mbarrier_do(emulator::MbarrierOperation::expect, barrier, bytes);
}
KDA_DEVICE bool mbarrier_test(u64* barrier, int parity) {
  return mbarrier_do(emulator::MbarrierOperation::test, barrier, parity);
}
KDA_DEVICE void mbarrier_wait(u64* barrier, int parity) {
  mbarrier_do(emulator::MbarrierOperation::wait, barrier, parity);
}

} // namespace kda
