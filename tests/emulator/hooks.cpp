// Linked into a checked object: what -fsanitize=thread makes the compiler call at every load and store. The
// calls go to the emulator; the sanitizer's own library is not linked.
#include "device.h"

namespace {

/// The stack of this thread is its own; everybody else's memory concerns the emulator.
inline __attribute__((always_inline)) void access(const void* address, unsigned long bytes, bool write,
                                                  const void* place) {
  const auto p = reinterpret_cast<unsigned long>(address);
  const auto frame = reinterpret_cast<unsigned long>(__builtin_frame_address(0));
  if ((p ^ frame) >= kda::emulator::kStackBytes)
    kda::emulator::current().services->access(address, bytes, write, place);
}

} // namespace

#define KDA_HOOK(name, bytes, write)                                                                         \
  void name(void* address) {                                                                                 \
    access(address, bytes, write, __builtin_return_address(0));                                              \
  }

extern "C" {
KDA_HOOK(__tsan_read1, 1, false)
KDA_HOOK(__tsan_read2, 2, false)
KDA_HOOK(__tsan_read4, 4, false)
KDA_HOOK(__tsan_read8, 8, false)
KDA_HOOK(__tsan_read16, 16, false)
KDA_HOOK(__tsan_write1, 1, true)
KDA_HOOK(__tsan_write2, 2, true)
KDA_HOOK(__tsan_write4, 4, true)
KDA_HOOK(__tsan_write8, 8, true)
KDA_HOOK(__tsan_write16, 16, true)
KDA_HOOK(__tsan_unaligned_read2, 2, false)
KDA_HOOK(__tsan_unaligned_read4, 4, false)
KDA_HOOK(__tsan_unaligned_read8, 8, false)
KDA_HOOK(__tsan_unaligned_read16, 16, false)
KDA_HOOK(__tsan_unaligned_write2, 2, true)
KDA_HOOK(__tsan_unaligned_write4, 4, true)
KDA_HOOK(__tsan_unaligned_write8, 8, true)
KDA_HOOK(__tsan_unaligned_write16, 16, true)
void __tsan_read_range(void* address, unsigned long bytes) {
  access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  access(address, bytes, true, __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// The sanitizer would intercept these of the C library.
void* memcpy(void* to, const void* from, unsigned long bytes) {
  access(from, bytes, false, __builtin_return_address(0));
  access(to, bytes, true, __builtin_return_address(0));
  auto* a = static_cast<unsigned char*>(to);
  const auto* b = static_cast<const unsigned char*>(from);
  for (unsigned long i = 0; i < bytes; ++i)
    a[i] = b[i];
  return to;
}
void* memset(void* to, int value, unsigned long bytes) {
  access(to, bytes, true, __builtin_return_address(0));
  auto* a = static_cast<unsigned char*>(to);
  for (unsigned long i = 0; i < bytes; ++i)
    a[i] = static_cast<unsigned char>(value);
  return to;
}
}
