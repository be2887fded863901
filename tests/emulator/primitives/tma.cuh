#pragma once
// Host version of templates/cuda/primitives/tma.cuh: loads complete at the wait of their mbarrier, stores at
// the wait of their group, or at once with emulator::Copies::early.
#include "primitives/mbarrier.cuh"

namespace kda {

struct alignas(64) TensorMap {
  u64 opaque[16];
};

KDA_DEVICE void fence_proxy_async() {
  emulator::current().services->fence_proxy();
}
KDA_DEVICE void prefetch_tensor_map(const TensorMap*) {}

KDA_DEVICE void bulk_load(void* shared, const void* global, int bytes, u64* barrier) {
  const emulator::BulkCopy copy{
      shared, const_cast<void*>(global), nullptr, barrier, static_cast<u32>(bytes), 0, {}};
  emulator::current().services->bulk(&copy);
}
KDA_DEVICE void bulk_store(void* global, const void* shared, int bytes) {
  const emulator::BulkCopy copy{const_cast<void*>(shared), global, nullptr, nullptr,
                                static_cast<u32>(bytes),   0,      {}};
  emulator::current().services->bulk(&copy);
}
KDA_DEVICE void commit_bulk_stores() {
  emulator::current().services->bulk_commit();
}
template <int pending>
KDA_DEVICE void wait_bulk_stores_read() {
  emulator::current().services->bulk_wait(pending);
}
template <int pending>
KDA_DEVICE void wait_bulk_stores() {
  emulator::current().services->bulk_wait(pending);
}

KDA_DEVICE void tensor_load(void* shared, const TensorMap* map, u64* barrier, int x, int y) {
  const emulator::BulkCopy copy{shared, nullptr, map, barrier, 0, 2, {x, y}};
  emulator::current().services->bulk(&copy);
}
KDA_DEVICE void tensor_store(const TensorMap* map, const void* shared, int x, int y) {
  const emulator::BulkCopy copy{const_cast<void*>(shared), nullptr, map, nullptr, 0, 2, {x, y}};
  emulator::current().services->bulk(&copy);
}
KDA_DEVICE void tensor_load(void* shared, const TensorMap* map, u64* barrier, int x, int y, int z) {
  const emulator::BulkCopy copy{shared, nullptr, map, barrier, 0, 3, {x, y, z}};
  emulator::current().services->bulk(&copy);
}
KDA_DEVICE void tensor_store(const TensorMap* map, const void* shared, int x, int y, int z) {
  const emulator::BulkCopy copy{const_cast<void*>(shared), nullptr, map, nullptr, 0, 3, {x, y, z}};
  emulator::current().services->bulk(&copy);
}
KDA_DEVICE void tensor_load(void* shared, const TensorMap* map, u64* barrier, int x, int y, int z, int w) {
  const emulator::BulkCopy copy{shared, nullptr, map, barrier, 0, 4, {x, y, z, w}};
  emulator::current().services->bulk(&copy);
}
KDA_DEVICE void tensor_store(const TensorMap* map, const void* shared, int x, int y, int z, int w) {
  const emulator::BulkCopy copy{const_cast<void*>(shared), nullptr, map, nullptr, 0, 4, {x, y, z, w}};
  emulator::current().services->bulk(&copy);
}

} // namespace kda
