#pragma once
// Host version of templates/cuda/primitives/vote.cuh.
#include "primitives/basic.cuh"

namespace kda {

KDA_DEVICE u32 vote_ballot(bool x) {
  emulator::WordArguments arguments{x ? 1U : 0U, 0};
  emulator::current().services->collective(emulator::WarpOperation::ballot, &arguments);
  return arguments.result;
}
KDA_DEVICE bool vote_any(bool x) {
  return vote_ballot(x) != 0;
}
KDA_DEVICE bool vote_all(bool x) {
  return vote_ballot(x) == 0xffffffffu;
}
KDA_DEVICE u32 atomic_add(u32* to, u32 value) {
  return emulator::current().services->atomic_add(to, value);
}
KDA_DEVICE float atomic_add(float* to, float value) {
  return emulator::current().services->atomic_add_float(to, value);
}
KDA_DEVICE int atomic_max(int* to, int value) {
  return emulator::current().services->atomic_max(to, value);
}
KDA_DEVICE void arrive_named(int id, int threads) {
  emulator::current().services->barrier(id, threads, true);
}

} // namespace kda
