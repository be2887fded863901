#pragma once
// Bulk copies by the TMA unit (sm_90). One thread issues; they run in the async proxy: what threads wrote to
// shared memory before needs fence_proxy_async, by the writers, before the barrier that the issuer passes.
#include "primitives/mbarrier.cuh"

namespace kda {

/// A CUtensorMap; cuTensorMapEncodeTiled fills it. In a __grid_constant__ parameter or global memory.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

KDA_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async;" ::: "memory");
}
KDA_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// `bytes` (a multiple of 16) to shared memory; both addresses 16-byte aligned. They count at `barrier`.
KDA_DEVICE void bulk_load(void* shared, const void* global, int bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
KDA_DEVICE void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
KDA_DEVICE void commit_bulk_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Until at most `pending` of this thread's groups still read shared memory.
template <int pending>
KDA_DEVICE void wait_bulk_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
template <int pending>
KDA_DEVICE void wait_bulk_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

// A box of the tensor at (x, y, ..), innermost dimension first, elements; rows outside are zero (load) or
// left out (store). A load always counts the whole box at `barrier`. shared: 128-byte aligned, and to 8 rows
// of the swizzle (1,024, 512, 256 bytes) so that byte b of the box lies at b ^ (b / 128 % 8) * 16 (128 B),
// b ^ (b / 128 % 4) * 16 (64 B), b ^ (b / 128 % 2) * 16 (32 B).
KDA_DEVICE void tensor_load(void* shared, const TensorMap* map, u64* barrier, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
               "{%3, %4}], [%2];" ::"r"(shared_address(shared)),
               "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
               : "memory");
}
KDA_DEVICE void tensor_store(const TensorMap* map, const void* shared, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(x), "r"(y)
               : "memory");
}
KDA_DEVICE void tensor_load(void* shared, const TensorMap* map, u64* barrier, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
               "{%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
               "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
               : "memory");
}
KDA_DEVICE void tensor_store(const TensorMap* map, const void* shared, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
KDA_DEVICE void tensor_load(void* shared, const TensorMap* map, u64* barrier, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
               "{%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
               "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
KDA_DEVICE void tensor_store(const TensorMap* map, const void* shared, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

} // namespace kda
