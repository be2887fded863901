#pragma once
// Types, conversions, fast functions, shuffles and barriers. PTX and CUDA built-ins stand only in
// primitives/, so that the emulator in tests/emulator can replace this folder and run every kernel on the
// CPU.
#define KDA_DEVICE __device__ __forceinline__
#define KDA_KERNEL(threads, ctas_per_sm) extern "C" __global__ void __launch_bounds__(threads, ctas_per_sm)
#define KDA_GRID_CONSTANT const __grid_constant__

namespace kda {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct bf16 {
  u16 bits;
};
struct fp16 {
  u16 bits;
};
struct alignas(8) Word2 {
  u32 w[2];
};
struct alignas(16) Word4 {
  u32 w[4];
};

KDA_DEVICE u32 float_bits(float x) {
  return __float_as_uint(x);
}
KDA_DEVICE float bits_float(u32 x) {
  return __uint_as_float(x);
}

KDA_DEVICE float to_float(float x) {
  return x;
}
KDA_DEVICE float to_float(bf16 x) {
  return bits_float(static_cast<u32>(x.bits) << 16);
}
KDA_DEVICE float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
KDA_DEVICE T from_float(float x); // round to nearest even
template <>
KDA_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
KDA_DEVICE bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
KDA_DEVICE fp16 from_float<fp16>(float x) {
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
/// Two values in one register, `lo` in the low half: what mma fragments hold.
template <class T>
KDA_DEVICE u32 pack2(float lo, float hi);
template <>
KDA_DEVICE u32 pack2<bf16>(float lo, float hi) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
template <>
KDA_DEVICE u32 pack2<fp16>(float lo, float hi) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
template <class T>
KDA_DEVICE float low_half(u32 x) {
  T y;
  y.bits = static_cast<u16>(x);
  return to_float(y);
}
template <class T>
KDA_DEVICE float high_half(u32 x) {
  T y;
  y.bits = static_cast<u16>(x >> 16);
  return to_float(y);
}
/// The larger of each of two pairs of fp16.
KDA_DEVICE u32 max_pairs(u32 a, u32 b) {
  u32 y;
  asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

/// 2^x, relative error 2^-22; flushes denormals to zero, exp2(-inf) = 0.
KDA_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KDA_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KDA_DEVICE float rcp_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KDA_DEVICE float rsqrt_fast(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// log(1 + x), accurate for small x (libdevice).
KDA_DEVICE float log1p_accurate(float x) {
  return log1pf(x);
}
KDA_DEVICE float fma(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
KDA_DEVICE float max(float a, float b) {
  return fmaxf(a, b);
}
KDA_DEVICE float min(float a, float b) {
  return fminf(a, b);
}
KDA_DEVICE int min(int a, int b) {
  return a < b ? a : b;
}
KDA_DEVICE int max(int a, int b) {
  return a > b ? a : b;
}
KDA_DEVICE i64 min(i64 a, i64 b) {
  return a < b ? a : b;
}
/// 1 or 0, in one instruction and no predicate.
KDA_DEVICE float one_if_equal(float a, float b) {
  float y;
  asm("set.eq.f32.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

/// a < b ? x : y, both of which are computed: no branch.
KDA_DEVICE float select_less(float a, float b, float x, float y) {
  float z;
  asm("{\n.reg .pred p;\nsetp.lt.f32 p, %1, %2;\nselp.f32 %0, %3, %4, p;\n}"
      : "=f"(z)
      : "f"(a), "f"(b), "f"(x), "f"(y));
  return z;
}

/// The same value, of which the compiler knows nothing: what a loop computes from it is computed in the loop,
/// and not held in registers from before.
KDA_DEVICE u32 hide(u32 x) {
  asm volatile("" : "+r"(x));
  return x;
}

KDA_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
KDA_DEVICE int block_index_x() {
  return static_cast<int>(blockIdx.x);
}
KDA_DEVICE int block_index_y() {
  return static_cast<int>(blockIdx.y);
}
KDA_DEVICE int block_index_z() {
  return static_cast<int>(blockIdx.z);
}
KDA_DEVICE int grid_size_x() {
  return static_cast<int>(gridDim.x);
}
KDA_DEVICE int lane_index() {
  return static_cast<int>(threadIdx.x & 31u);
}
/// Uniform over the warp, and known to be by the compiler.
KDA_DEVICE int warp_index() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x >> 5), 0);
}

/// The dynamic shared memory of the CTA, 1,024-byte aligned by the driver; there is no static shared memory.
KDA_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char kda_shared[];
  return kda_shared;
}
KDA_DEVICE void sync_block() {
  __syncthreads();
}
KDA_DEVICE void sync_warp() {
  __syncwarp();
}
/// Barrier `id` (1..15) among `threads` threads of the CTA.
KDA_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

KDA_DEVICE float shuffle(float x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
KDA_DEVICE float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
KDA_DEVICE float shuffle_up(float x, int delta) {
  return __shfl_up_sync(0xffffffffu, x, static_cast<u32>(delta));
}
KDA_DEVICE float shuffle_down(float x, int delta) {
  return __shfl_down_sync(0xffffffffu, x, static_cast<u32>(delta));
}
KDA_DEVICE u32 shuffle(u32 x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
KDA_DEVICE u32 shuffle_xor(u32 x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
KDA_DEVICE int shuffle(int x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
KDA_DEVICE int shuffle_up(int x, int delta) {
  return __shfl_up_sync(0xffffffffu, x, static_cast<u32>(delta));
}

/// Sum over the warp, the same bits in every lane.
KDA_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1)
    x += shuffle_xor(x, mask);
  return x;
}

/// Global loads and stores of 8 or 16 bytes that are used once: loads pass by L1, stores leave L2 first.
KDA_DEVICE Word2 load_streaming(const Word2* p) {
  Word2 r;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(r.w[0]), "=r"(r.w[1]) : "l"(p));
  return r;
}
KDA_DEVICE Word4 load_streaming(const Word4* p) {
  Word4 r;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
               : "l"(p));
  return r;
}
KDA_DEVICE void store_streaming(Word2* p, Word2 v) {
  asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]) : "memory");
}
KDA_DEVICE void store_streaming(Word4* p, Word4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]),
               "r"(v.w[3])
               : "memory");
}

// Programmatic dependent launch, sm_90 and later; a launch without the attribute passes both at once.
/// Waits until the kernels before this one in its stream have ended and what they wrote is visible.
KDA_DEVICE void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
/// The kernel behind this one may start, as far as its own wait.
KDA_DEVICE void start_kernel_behind() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

} // namespace kda
