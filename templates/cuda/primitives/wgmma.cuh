#pragma once
// wgmma (sm_90a only): a warpgroup (128 threads, 4 warps of consecutive numbers from a multiple of 4)
// multiplies 64 x n. Registers of warp w hold rows 16w..16w+15:
//   D: d[4j + 2i + e] = (row g + 8i, column 8j + 2t + e), g = lane/4, t = lane%4
//   A: as mma.cuh's m16n8k16 (16-bit) and m16n8k8 (tf32)
// Order: wgmma_fence (registers that threads wrote are ready), wgmma .., wgmma_commit, wgmma_wait. Until the
// wait, d must not be touched, nor shared operands be written. Shared operands need fence_proxy_async after
// generic writes. ptxas serialises every wgmma if d is touched between (C7510 to C7519: treat as an error).
#include "primitives/mma.cuh"

namespace kda {

struct tf32 {};
template <class T, class U>
constexpr bool kSameType = false;
template <class T>
constexpr bool kSameType<T, T> = true;

enum class Swizzle : int { none = 0, b128 = 1, b64 = 2, b32 = 3 };
/// Descriptor of a shared matrix. `stride` and `leading` in bytes (multiples of 16):
///   K-major, swizzled: rows of 128, 64 or 32 bytes; `stride` from 8 rows to the next 8; `leading` unused
///   K-major, no swizzle: 8 rows x 16 bytes, dense; `stride` to the next 8 rows, `leading` to the next 16
///   bytes of k
///   transposed (MN-major), swizzled: 8 values of k, each 128, 64 or 32 bytes of m; `stride` to the next
///   8 of k, `leading` to the next 128, 64 or 32 bytes of m
///   transposed, no swizzle: 8 values of k, each 16 bytes of m; `leading` to the next 8 of k, `stride` to the
///   next 16 bytes of m
/// The next 16 of k in a swizzled K-major row: `shared` + 32 bytes.
KDA_DEVICE u64 matrix_descriptor(const void* shared, Swizzle swizzle, int stride, int leading = 16) {
  return static_cast<u64>((shared_address(shared) & 0x3ffffu) >> 4) |
         static_cast<u64>(static_cast<u32>(leading) >> 4 & 0x3fffu) << 16 |
         static_cast<u64>(static_cast<u32>(stride) >> 4 & 0x3fffu) << 32 |
         static_cast<u64>(static_cast<u32>(swizzle)) << 62;
}

/// The same for what lies `offset` bytes behind a place in shared memory: one addition each where several lie
/// behind one place. Needs shared memory below 256 KB, which no CTA has.
KDA_DEVICE u32 matrix_place(const void* shared) {
  return (shared_address(shared) & 0x3ffffu) >> 4;
}
KDA_DEVICE u64 matrix_descriptor(u32 place, int offset, Swizzle swizzle, int stride, int leading = 16) {
  const u32 low = place + (static_cast<u32>(offset) >> 4 | (static_cast<u32>(leading) >> 4 & 0x3fffu) << 16);
  const u32 high = (static_cast<u32>(stride) >> 4 & 0x3fffu) | static_cast<u32>(swizzle) << 30;
  return static_cast<u64>(high) << 32 | low;
}

KDA_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
KDA_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
KDA_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/// Of a warpgroup; the kernel's launch bounds must name one CTA per SM. 24 to 256, multiples of 8.
template <int registers>
KDA_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
KDA_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// d = (accumulate ? d : 0) +- a b.
#define KDA_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define KDA_D8(i) KDA_D4(i), KDA_D4((i) + 4)
#define KDA_D16(i) KDA_D8(i), KDA_D8((i) + 8)
#define KDA_D32(i) KDA_D16(i), KDA_D16((i) + 16)
#define KDA_D64(i) KDA_D32(i), KDA_D32((i) + 32)
#define KDA_D128(i) KDA_D64(i), KDA_D64((i) + 64)
#define KDA_LIST4 "%0, %1, %2, %3"
#define KDA_LIST8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define KDA_LIST16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define KDA_LIST32                                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "               \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KDA_LIST64                                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "               \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "               \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "               \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define KDA_LIST128                                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "               \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "               \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "               \
  "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, "               \
  "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "               \
  "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "                 \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "               \
  "%123, %124, %125, %126, %127"
// The numbers are those of the operands behind the r = n / 2 registers of d.
#define KDA_WGMMA_REGISTERS(n, r, k, type, transpose, a0, a1, a2, a3, b, p, s, t)                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n k        \
               "." type " {" KDA_LIST##r "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, %" #s     \
                                         ", 1" transpose(t) ";\n}"                                           \
               : KDA_D##r(0)                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor),                              \
                 "r"(static_cast<int>(accumulate)), "n"(negate ? -1 : 1), "n"(b_transposed ? 1 : 0))
#define KDA_WGMMA_SHARED(n, r, k, type, transpose, a, b, p, s, ta, tb)                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n k        \
               "." type " {" KDA_LIST##r "}, %" #a ", %" #b ", p, %" #s ", 1" transpose(ta, tb) ";\n}"       \
               : KDA_D##r(0)                                                                                 \
               : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)),                    \
                 "n"(negate ? -1 : 1), "n"(a_transposed ? 1 : 0), "n"(b_transposed ? 1 : 0))
#define KDA_ONE(t) ", %" #t
#define KDA_TWO(ta, tb) ", %" #ta ", %" #tb
#define KDA_NONE(...) ""
#define KDA_WGMMA_REGISTERS_ALL(k, type, transpose)                                                          \
  if constexpr (n == 8) KDA_WGMMA_REGISTERS(8, 4, k, type, transpose, 4, 5, 6, 7, 8, 9, 10, 11);             \
  if constexpr (n == 16) KDA_WGMMA_REGISTERS(16, 8, k, type, transpose, 8, 9, 10, 11, 12, 13, 14, 15);       \
  if constexpr (n == 32) KDA_WGMMA_REGISTERS(32, 16, k, type, transpose, 16, 17, 18, 19, 20, 21, 22, 23);    \
  if constexpr (n == 64) KDA_WGMMA_REGISTERS(64, 32, k, type, transpose, 32, 33, 34, 35, 36, 37, 38, 39);    \
  if constexpr (n == 128) KDA_WGMMA_REGISTERS(128, 64, k, type, transpose, 64, 65, 66, 67, 68, 69, 70, 71);  \
  if constexpr (n == 256)                                                                                    \
    KDA_WGMMA_REGISTERS(256, 128, k, type, transpose, 128, 129, 130, 131, 132, 133, 134, 135);
#define KDA_WGMMA_SHARED_ALL(k, type, transpose)                                                             \
  if constexpr (n == 8) KDA_WGMMA_SHARED(8, 4, k, type, transpose, 4, 5, 6, 7, 8, 9);                        \
  if constexpr (n == 16) KDA_WGMMA_SHARED(16, 8, k, type, transpose, 8, 9, 10, 11, 12, 13);                  \
  if constexpr (n == 32) KDA_WGMMA_SHARED(32, 16, k, type, transpose, 16, 17, 18, 19, 20, 21);               \
  if constexpr (n == 64) KDA_WGMMA_SHARED(64, 32, k, type, transpose, 32, 33, 34, 35, 36, 37);               \
  if constexpr (n == 128) KDA_WGMMA_SHARED(128, 64, k, type, transpose, 64, 65, 66, 67, 68, 69);             \
  if constexpr (n == 256) KDA_WGMMA_SHARED(256, 128, k, type, transpose, 128, 129, 130, 131, 132, 133);

template <class T, int n, bool b_transposed = false, bool negate = false>
KDA_DEVICE void wgmma(float (&d)[n / 2], const u32 (&a)[4], u64 b_descriptor, bool accumulate = true) {
  static_assert(n == 8 || n == 16 || n == 32 || n == 64 || n == 128 || n == 256);
  if constexpr (kSameType<T, bf16>) {
    KDA_WGMMA_REGISTERS_ALL("k16", "f32.bf16.bf16", KDA_ONE)
  } else if constexpr (kSameType<T, fp16>) {
    KDA_WGMMA_REGISTERS_ALL("k16", "f32.f16.f16", KDA_ONE)
  } else {
    static_assert(!b_transposed, "tf32 operands are K-major");
    KDA_WGMMA_REGISTERS_ALL("k8", "f32.tf32.tf32", KDA_NONE)
  }
}
template <class T, int n, bool a_transposed = false, bool b_transposed = false, bool negate = false>
KDA_DEVICE void wgmma(float (&d)[n / 2], u64 a_descriptor, u64 b_descriptor, bool accumulate = true) {
  static_assert(n == 8 || n == 16 || n == 32 || n == 64 || n == 128 || n == 256);
  if constexpr (kSameType<T, bf16>) {
    KDA_WGMMA_SHARED_ALL("k16", "f32.bf16.bf16", KDA_TWO)
  } else if constexpr (kSameType<T, fp16>) {
    KDA_WGMMA_SHARED_ALL("k16", "f32.f16.f16", KDA_TWO)
  } else {
    static_assert(!a_transposed && !b_transposed, "tf32 operands are K-major");
    KDA_WGMMA_SHARED_ALL("k8", "f32.tf32.tf32", KDA_NONE)
  }
}

} // namespace kda
