#pragma once
// Global memory of the emulator: NaN until written, between pages that cannot be touched.
#include "shadow.h"
#include <atomic>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace kda::emulator {

/// What the checker knows of 2 bytes: the CTAs of the last launch that wrote and read them. 0: nobody.
struct GlobalCell {
  std::atomic<std::uint64_t> writer{0}, reader{0};
};
using GlobalCells = std::shared_ptr<std::vector<GlobalCell>>;

/// Functions of the process: a fault says which buffer an address belongs to. Thread-safe.
class Memory {
public:
  /// 256-byte aligned, at least 0 bytes; null when memory ran out. `checked`: with cells.
  [[nodiscard]] static void* allocate(std::size_t bytes, bool checked);
  static void release(void* data);
  /// The host has written here. Words of 0xFFFFFFFF count as not written: with those, tests fill outputs.
  static void written(void* to, std::size_t bytes);
  /// Empty, or which live buffer was overwritten near its ends.
  [[nodiscard]] static std::string check();
  /// "byte 4096 of a buffer of 4096 bytes", or that it is in no buffer.
  [[nodiscard]] static std::string describe(const void* address);
};

/// The checked buffers as a launch finds them. Thread-safe.
class GlobalShadow {
public:
  GlobalShadow();
  /// An access by CTA `block` of this launch. Empty, or the fault.
  [[nodiscard]] std::string access(std::size_t block, const void* address, std::size_t bytes,
                                   Access access) const;

private:
  struct Range {
    const unsigned char* data;
    std::size_t bytes;
    GlobalCells cells;
  };
  static constexpr std::uint64_t kMany = 0xffffffff; ///< as the CTA: several

  [[nodiscard]] const Range* find(const void* address) const;

  std::vector<Range> ranges_; ///< by address
  std::uint64_t launch_;      ///< upper half of what cells hold
};

} // namespace kda::emulator
