#pragma once
// Host version of templates/cuda/primitives/basic.cuh: the same names, one fiber per CUDA thread.
#include "device.h"
#define KDA_DEVICE inline __attribute__((always_inline))
#define KDA_KERNEL(threads, ctas_per_sm) extern "C" __attribute__((visibility("default"))) void
#define KDA_GRID_CONSTANT const

extern "C" int printf(const char*, ...); // as in device code: print from one thread

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
  return __builtin_bit_cast(u32, x);
}
KDA_DEVICE float bits_float(u32 x) {
  return __builtin_bit_cast(float, x);
}

KDA_DEVICE float to_float(float x) {
  return x;
}
KDA_DEVICE float to_float(bf16 x) {
  return bits_float(static_cast<u32>(x.bits) << 16);
}
KDA_DEVICE float to_float(fp16 x) {
  return static_cast<float>(__builtin_bit_cast(_Float16, x.bits));
}
template <class T>
KDA_DEVICE T from_float(float x); // round to nearest even
template <>
KDA_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
KDA_DEVICE bf16 from_float<bf16>(float x) {
  if (x != x) return {0x7fff};
  const u32 u = float_bits(x);
  return {static_cast<u16>((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
template <>
KDA_DEVICE fp16 from_float<fp16>(float x) {
  if (x != x) return {0x7fff};
  return {__builtin_bit_cast(u16, static_cast<_Float16>(x))};
}
/// Two values in one register, `lo` in the low half: what mma fragments hold.
template <class T>
KDA_DEVICE u32 pack2(float lo, float hi) {
  return from_float<T>(lo).bits | static_cast<u32>(from_float<T>(hi).bits) << 16;
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
/// .ftz: a denormal becomes a zero of its sign.
KDA_DEVICE float flush_denormal(float x) {
  return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.f, x) : x;
}
KDA_DEVICE float exp2_fast(float x) {
  return flush_denormal(__builtin_exp2f(flush_denormal(x)));
}
KDA_DEVICE float log2_fast(float x) {
  return flush_denormal(__builtin_log2f(flush_denormal(x)));
}
KDA_DEVICE float rcp_fast(float x) {
  return flush_denormal(1.f / flush_denormal(x));
}
KDA_DEVICE float rsqrt_fast(float x) {
  return 1.f / __builtin_sqrtf(flush_denormal(x));
}
KDA_DEVICE float log1p_accurate(float x) {
  return __builtin_log1pf(x);
}
KDA_DEVICE float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
/// A NaN loses against a number, as on the device.
KDA_DEVICE float max(float a, float b) {
  return __builtin_fmaxf(a, b);
}
KDA_DEVICE float one_if_equal(float a, float b) {
  return a == b ? 1.f : 0.f;
}
KDA_DEVICE float select_less(float a, float b, float x, float y) {
  return a < b ? x : y;
}
KDA_DEVICE u32 max_pairs(u32 a, u32 b) {
  const float lo = max(low_half<fp16>(a), low_half<fp16>(b)),
              hi = max(high_half<fp16>(a), high_half<fp16>(b));
  return pack2<fp16>(lo, hi);
}
KDA_DEVICE float min(float a, float b) {
  return __builtin_fminf(a, b);
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

KDA_DEVICE int thread_index() {
  return emulator::current().index;
}
KDA_DEVICE int block_index_x() {
  return emulator::current().block[0];
}
KDA_DEVICE int block_index_y() {
  return emulator::current().block[1];
}
KDA_DEVICE int block_index_z() {
  return emulator::current().block[2];
}
KDA_DEVICE int grid_size_x() {
  return emulator::current().grid[0];
}
KDA_DEVICE int lane_index() {
  return thread_index() & 31;
}

KDA_DEVICE unsigned char* shared_memory() {
  return static_cast<unsigned char*>(__builtin_assume_aligned(emulator::current().shared, 1024));
}
KDA_DEVICE void sync_block() {
  emulator::current().services->barrier(0, 0, false);
}
KDA_DEVICE void sync_warp() {
  emulator::current().services->collective(emulator::WarpOperation::sync, nullptr);
}
KDA_DEVICE void sync_named(int id, int threads) {
  emulator::current().services->barrier(id, threads, false);
}

KDA_DEVICE u32 shuffle(u32 x, int lane) {
  emulator::ShuffleArguments arguments{x, lane, 0};
  emulator::current().services->collective(emulator::WarpOperation::shuffle, &arguments);
  return arguments.result;
}
/// A warp operation as on the device, so that a call which not every lane reaches is found here and not as a
/// hang there.
KDA_DEVICE int warp_index() {
  return static_cast<int>(shuffle(static_cast<u32>(thread_index() >> 5), 0));
}
KDA_DEVICE u32 shuffle_xor(u32 x, int mask) {
  return shuffle(x, lane_index() ^ mask);
}
KDA_DEVICE float shuffle(float x, int lane) {
  return bits_float(shuffle(float_bits(x), lane));
}
KDA_DEVICE int shuffle(int x, int lane) {
  return static_cast<int>(shuffle(static_cast<u32>(x), lane));
}
KDA_DEVICE float shuffle_xor(float x, int mask) {
  return shuffle(x, lane_index() ^ mask);
}
/// A lane without a partner keeps its own value.
KDA_DEVICE float shuffle_up(float x, int delta) {
  const int lane = lane_index();
  return shuffle(x, lane >= delta ? lane - delta : lane);
}
KDA_DEVICE float shuffle_down(float x, int delta) {
  const int lane = lane_index();
  return shuffle(x, lane + delta < 32 ? lane + delta : lane);
}
KDA_DEVICE int shuffle_up(int x, int delta) {
  const int lane = lane_index();
  return shuffle(x, lane >= delta ? lane - delta : lane);
}

/// Sum over the warp, the same bits in every lane.
KDA_DEVICE float warp_sum(float x) {
  for (int mask = 16; mask; mask >>= 1)
    x += shuffle_xor(x, mask);
  return x;
}

KDA_DEVICE Word2 load_streaming(const Word2* p) {
  return *p;
}
KDA_DEVICE Word4 load_streaming(const Word4* p) {
  return *p;
}
KDA_DEVICE void store_streaming(Word2* p, Word2 v) {
  *p = v;
}
KDA_DEVICE void store_streaming(Word4* p, Word4 v) {
  *p = v;
}
KDA_DEVICE u32 hide(u32 x) {
  return x;
}
/// Launches run one after the other here.
KDA_DEVICE void wait_for_kernel_before() {}
KDA_DEVICE void start_kernel_behind() {}

} // namespace kda
