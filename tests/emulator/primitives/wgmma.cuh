#pragma once
// Host version of templates/cuda/primitives/wgmma.cuh: products are formed at the wait (or at once,
// emulator::Copies::early); until then d holds NaN.
#include "primitives/mma.cuh"

namespace kda {

struct tf32 {};

enum class Swizzle : int { none = 0, b128 = 1, b64 = 2, b32 = 3 };
KDA_DEVICE u64 matrix_descriptor(const void* shared, Swizzle swizzle, int stride, int leading = 16) {
  return static_cast<u64>((shared_address(shared) & 0x3ffffu) >> 4) |
         static_cast<u64>(static_cast<u32>(leading) >> 4 & 0x3fffu) << 16 |
         static_cast<u64>(static_cast<u32>(stride) >> 4 & 0x3fffu) << 32 |
         static_cast<u64>(static_cast<u32>(swizzle)) << 62;
}

KDA_DEVICE u32 matrix_place(const void* shared) {
  return (shared_address(shared) & 0x3ffffu) >> 4;
}
KDA_DEVICE u64 matrix_descriptor(u32 place, int offset, Swizzle swizzle, int stride, int leading = 16) {
  const u32 low = place + (static_cast<u32>(offset) >> 4 | (static_cast<u32>(leading) >> 4 & 0x3fffu) << 16);
  const u32 high = (static_cast<u32>(stride) >> 4 & 0x3fffu) | static_cast<u32>(swizzle) << 30;
  return static_cast<u64>(high) << 32 | low;
}

KDA_DEVICE void wgmma_fence() {
  emulator::current().services->group(emulator::GroupOperation::fence, nullptr);
}
KDA_DEVICE void wgmma_commit() {
  emulator::current().services->group(emulator::GroupOperation::commit, nullptr);
}
template <int pending>
KDA_DEVICE void wgmma_wait() {
  int arguments = pending;
  emulator::current().services->group(emulator::GroupOperation::wait, &arguments);
}

template <int registers>
KDA_DEVICE void release_registers() {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0);
  emulator::current().services->collective(emulator::WarpOperation::set_registers, nullptr);
}
template <int registers>
KDA_DEVICE void take_registers() {
  release_registers<registers>();
}

template <class T>
constexpr emulator::Element kElement = emulator::Element::tf32;
template <>
inline constexpr emulator::Element kElement<bf16> = emulator::Element::bf16;
template <>
inline constexpr emulator::Element kElement<fp16> = emulator::Element::fp16;

template <class T, int n, bool b_transposed = false, bool negate = false>
KDA_DEVICE void wgmma(float (&d)[n / 2], const u32 (&a)[4], u64 b_descriptor, bool accumulate = true) {
  emulator::WgmmaArguments arguments{
      d, n,           kElement<T>, true, false, b_transposed, negate, accumulate, {a[0], a[1], a[2], a[3]},
      0, b_descriptor};
  emulator::current().services->group(emulator::GroupOperation::wgmma, &arguments);
}
template <class T, int n, bool a_transposed = false, bool b_transposed = false, bool negate = false>
KDA_DEVICE void wgmma(float (&d)[n / 2], u64 a_descriptor, u64 b_descriptor, bool accumulate = true) {
  emulator::WgmmaArguments arguments{
      d,      n,          kElement<T>, false,        a_transposed, b_transposed,
      negate, accumulate, {},          a_descriptor, b_descriptor};
  emulator::current().services->group(emulator::GroupOperation::wgmma, &arguments);
}

} // namespace kda
