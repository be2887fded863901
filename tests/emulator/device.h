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
  mma_bf16,
  mma_fp16,
  mma_tf32,
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
struct MmaArguments {
  float* d;      ///< [4]
  const void* a; ///< [4] words
  unsigned b0, b1;
};

/// The emulator's entry points; every one may switch to another fiber.
struct Services {
  void (*collective)(WarpOperation, void* arguments);
  void (*barrier)(int id, int threads);
  void (*copy)(void* shared, const void* global, int bytes, bool valid);
  void (*commit)();
  void (*wait)(int pending);
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
