#pragma once
// What a compiled kernel and the emulator share. Included by tests/emulator/primitives, so it uses no
// standard header: kernels compile in a fraction of a second.

namespace kda::emulator {

/// What the 32 lanes of a warp do together; all of them must call the same one.
enum class WarpOperation : int {
  sync,
  shuffle,
  load_matrix,
  load_matrix_transposed,
  store_matrix,
  store_matrix_transposed,
  move_matrix,
  ballot,
  mma_bf16,
  mma_fp16,
  mma_tf32,
  set_registers,
};
struct ShuffleArguments {
  unsigned value;
  int source; ///< lane, taken modulo 32
  unsigned result;
};
struct LoadMatrixArguments {
  unsigned* result; ///< [4]
  const void* row;
};
struct StoreMatrixArguments {
  const unsigned* value; ///< [4]
  void* row;
};
struct WordArguments { ///< of move_matrix and ballot
  unsigned value, result;
};
struct MmaArguments {
  float* d;      ///< [4]
  const void* a; ///< [4] words
  unsigned b0, b1;
};

/// What the 128 threads of a warpgroup do together.
enum class GroupOperation : int { wgmma, fence, commit, wait };
enum class Element : int { bf16, fp16, tf32 };
struct WgmmaArguments {
  float* d; ///< [n / 2]
  int n;
  Element element;
  bool a_in_registers, a_transposed, b_transposed, negate, accumulate;
  unsigned a[4];
  unsigned long long a_descriptor, b_descriptor;
};

enum class MbarrierOperation : int { init, arrive, expect_arrive, expect, test, wait };

/// A bulk or tensor copy between shared and global memory.
struct BulkCopy {
  void* shared;
  void* global;          ///< bytes, or null for a tensor
  const void* map;       ///< TensorMapFields, or null
  void* mbarrier;        ///< of a copy to shared memory; null for one to global memory
  unsigned bytes;        ///< of a copy without a map
  int dimensions, at[5]; ///< of a copy with a map; innermost first
};
/// What the emulator keeps in the 128 bytes of a CUtensorMap.
struct alignas(64) TensorMapFields {
  unsigned char* base;
  unsigned long long stride[4]; ///< bytes, of dimensions 1 ..
  unsigned size[5], box[5];
  int dimensions, element_bytes, swizzle_bytes; ///< 0, 32, 64 or 128
  unsigned mark;                                ///< kTensorMapMark, or it is no map of the emulator
};
constexpr unsigned kTensorMapMark = 0x4b444154;
static_assert(sizeof(TensorMapFields) == 128);

/// The emulator's entry points; every one may switch to another fiber.
struct Services {
  void (*collective)(WarpOperation, void* arguments);
  void (*barrier)(int id, int threads, bool arrive_only);
  void (*copy)(void* shared, const void* global, int bytes, bool valid);
  void (*commit)();
  void (*wait)(int pending);
  void (*arrive_copies)(void* barrier);
  void (*group)(GroupOperation, void* arguments); ///< wait: pointer to int, groups that may stay pending
  bool (*mbarrier)(MbarrierOperation, void* barrier, unsigned value);
  void (*bulk)(const BulkCopy*);
  void (*bulk_commit)();
  void (*bulk_wait)(int pending);
  unsigned (*atomic_add)(unsigned* to, unsigned value);
  float (*atomic_add_float)(float* to, float value);
  int (*atomic_max)(int* to, int value);
  void (*fence_proxy)();
  void (*fence_mbarrier_init)();
  /// A load or store of the kernel; only objects that were compiled to be checked call it.
  void (*access)(const void* address, unsigned long bytes, bool write, const void* place);
};

/// One CUDA thread. A pointer to it stands in the last word of its stack, which is aligned to its size: no
/// thread-local storage, so the switch between fibers moves the stack pointer only.
struct Thread {
  int index = 0;
  int block[3] = {0, 0, 0};
  int grid[3] = {1, 1, 1};
  unsigned char* shared = nullptr;
  const Services* services = nullptr;
};
constexpr unsigned long kStackBytes = 256UL << 10;
inline __attribute__((always_inline)) Thread& current() {
  const auto sp = reinterpret_cast<unsigned long>(__builtin_frame_address(0));
  return **reinterpret_cast<Thread**>((sp | (kStackBytes - 1)) - (sizeof(void*) - 1));
}

} // namespace kda::emulator
