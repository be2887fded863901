// Buffers between guard pages, with canaries where page and buffer ends differ.
#include "memory.h"
#include <cstring>
#include <fmt/format.h>
#include <map>
#include <mutex>
#include <sys/mman.h>

namespace kda::emulator {
namespace {

constexpr std::size_t kPage = 4096, kGuard = std::size_t{1} << 20, kAlignment = 256;
constexpr unsigned char kPoison = 0xFF, kCanary = 0xCB;

struct Buffer {
  unsigned char* map;
  std::size_t map_bytes;
  unsigned char* data;
  std::size_t bytes;

  [[nodiscard]] std::string text(const void* address) const {
    return fmt::format("byte {} of a buffer of {} bytes", static_cast<const unsigned char*>(address) - data,
                       bytes);
  }
  [[nodiscard]] std::string check() const {
    for (const unsigned char* p = map + kGuard; p < map + map_bytes - kGuard; ++p)
      if ((p < data || p >= data + bytes) && *p != kCanary) return "a write to " + text(p);
    return {};
  }
};

std::mutex mutex;
std::map<const void*, Buffer> buffers; // by data

} // namespace

void* Memory::allocate(std::size_t bytes) {
  const std::size_t used = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const std::size_t body = (used + kPage - 1) / kPage * kPage + (used == 0 ? kPage : 0);
  Buffer b{nullptr, body + 2 * kGuard, nullptr, bytes};
  void* map = mmap(nullptr, b.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  b.map = static_cast<unsigned char*>(map);
  mprotect(b.map, kGuard, PROT_NONE);
  mprotect(b.map + kGuard + body, kGuard, PROT_NONE);
  b.data = b.map + kGuard + body - used - (used == 0 ? kAlignment : 0);
  std::memset(b.map + kGuard, kCanary, body);
  std::memset(b.data, kPoison, bytes);
  const std::scoped_lock lock(mutex);
  buffers.emplace(b.data, b);
  return b.data;
}

void Memory::release(void* data) {
  const std::scoped_lock lock(mutex);
  const auto it = buffers.find(data);
  if (it == buffers.end()) return;
  munmap(it->second.map, it->second.map_bytes);
  buffers.erase(it);
}

std::string Memory::check() {
  const std::scoped_lock lock(mutex);
  for (const auto& [data, buffer] : buffers)
    if (std::string wrong = buffer.check(); !wrong.empty()) return wrong;
  return {};
}

std::string Memory::describe(const void* address) {
  const std::scoped_lock lock(mutex);
  for (const auto& [data, buffer] : buffers) {
    const auto* p = static_cast<const unsigned char*>(address);
    if (p >= buffer.map && p < buffer.map + buffer.map_bytes) return buffer.text(address);
  }
  return fmt::format("address {}, in no buffer", address);
}

} // namespace kda::emulator
