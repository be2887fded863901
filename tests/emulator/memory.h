#pragma once
// Global memory of the emulator: NaN until written, between pages that cannot be touched.
#include <cstddef>
#include <string>

namespace kda::emulator {

/// Functions of the process: a fault says which buffer an address belongs to. Thread-safe.
class Memory {
public:
  /// 256-byte aligned, at least 0 bytes; null when memory ran out.
  [[nodiscard]] static void* allocate(std::size_t bytes);
  static void release(void* data);
  /// Empty, or which live buffer was overwritten near its ends.
  [[nodiscard]] static std::string check();
  /// "byte 4096 of a buffer of 4096 bytes", or that it is in no buffer.
  [[nodiscard]] static std::string describe(const void* address);
};

} // namespace kda::emulator
