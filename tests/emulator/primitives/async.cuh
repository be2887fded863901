#pragma once
// Host version of templates/cuda/primitives/async.cuh: a copy completes at the wait that covers its group (or
// at once, emulator::Copies::early).
#include "primitives/mma.cuh"

namespace kda {

KDA_DEVICE void copy_async_16(void* shared, const void* global, bool valid = true) {
  emulator::current().services->copy(shared, global, 16, valid);
}
KDA_DEVICE void copy_async_8(void* shared, const void* global, bool valid = true) {
  emulator::current().services->copy(shared, global, 8, valid);
}
KDA_DEVICE void commit_copies() {
  emulator::current().services->commit();
}
template <int pending>
KDA_DEVICE void wait_copies() {
  emulator::current().services->wait(pending);
}
KDA_DEVICE void arrive_copies(u64* barrier) {
  emulator::current().services->arrive_copies(barrier);
}

} // namespace kda
