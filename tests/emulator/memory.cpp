// Buffers between guard pages, with canaries where page and buffer ends differ.
#include "memory.h"
#include <algorithm>
#include <cstring>
#include <fmt/format.h>
#include <map>
#include <mutex>
#include <sys/mman.h>

namespace kda::emulator {
namespace {

constexpr std::size_t kPage = 4096, kGuard = std::size_t{1} << 20, kAlignment = 256;
constexpr std::size_t kCell = 2; // bytes of a GlobalCell
constexpr unsigned char kPoison = 0xFF, kCanary = 0xCB;

struct Buffer {
  unsigned char* map;
  std::size_t map_bytes;
  unsigned char* data;
  std::size_t bytes;
  GlobalCells cells;

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

constexpr std::uint64_t kHost = 1; // below every launch

} // namespace

void* Memory::allocate(std::size_t bytes, bool checked) {
  const std::size_t used = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const std::size_t body = (used + kPage - 1) / kPage * kPage + (used == 0 ? kPage : 0);
  Buffer b{nullptr, body + 2 * kGuard, nullptr, bytes, nullptr};
  void* map = mmap(nullptr, b.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  b.map = static_cast<unsigned char*>(map);
  mprotect(b.map, kGuard, PROT_NONE);
  mprotect(b.map + kGuard + body, kGuard, PROT_NONE);
  b.data = b.map + kGuard + body - used - (used == 0 ? kAlignment : 0);
  std::memset(b.map + kGuard, kCanary, body);
  std::memset(b.data, kPoison, bytes);
  if (checked) b.cells = std::make_shared<std::vector<GlobalCell>>((bytes + kCell - 1) / kCell);
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

void Memory::written(void* to, std::size_t bytes) {
  const std::scoped_lock lock(mutex);
  auto it = buffers.upper_bound(to);
  if (it == buffers.begin()) return;
  const Buffer& buffer = (--it)->second;
  const auto* p = static_cast<const unsigned char*>(to);
  if (buffer.cells == nullptr || p >= buffer.data + buffer.bytes) return;
  const auto first = static_cast<std::size_t>(p - buffer.data);
  for (std::size_t at = first; at < first + bytes; at += kCell) {
    std::uint32_t word = 0;
    const std::size_t word_at = at / sizeof word * sizeof word;
    std::memcpy(&word, buffer.data + word_at, std::min(sizeof word, buffer.bytes - word_at));
    (*buffer.cells)[at / kCell].writer = word == 0xffffffff ? 0 : kHost;
  }
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

GlobalShadow::GlobalShadow() {
  static std::atomic<std::uint64_t> launches{0};
  launch_ = ++launches << 32;
  const std::scoped_lock lock(mutex);
  for (const auto& [data, buffer] : buffers)
    if (buffer.cells != nullptr) ranges_.push_back({buffer.data, buffer.bytes, buffer.cells});
}

const GlobalShadow::Range* GlobalShadow::find(const void* address) const {
  const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                                      [](const void* a, const Range& range) { return a < range.data; });
  return after == ranges_.begin() ? nullptr : &after[-1];
}

std::string GlobalShadow::access(std::size_t block, const void* address, std::size_t bytes,
                                 Access access) const {
  const Range* range = find(address);
  const char* const verb = access == Access::read ? "read" : "write";
  const auto offset =
      range == nullptr ? 0
                       : static_cast<std::size_t>(static_cast<const unsigned char*>(address) - range->data);
  if (range == nullptr || offset + bytes > range->bytes)
    return fmt::format("out of bounds: a {} of {}", verb, Memory::describe(address));
  const std::uint64_t me = launch_ | (block + 1);
  const auto another = [&](std::uint64_t who) {
    return who > launch_ && who <= (launch_ | kMany) && who != me;
  };
  const auto fault = [&](std::size_t at, std::string_view kind, std::string_view what) {
    return fmt::format("{}: a {} of byte {} of a buffer of {} bytes, {}", kind, verb, at * kCell,
                       range->bytes, what);
  };
  for (std::size_t at = offset / kCell; at * kCell < offset + bytes; ++at) {
    GlobalCell& cell = (*range->cells)[at];
    const std::uint64_t writer = cell.writer;
    if (access != Access::write && writer == 0) return fault(at, "uninitialised", "which nobody wrote");
    if (access == Access::atomic) continue;
    if (another(writer)) return fault(at, "race", "which another block of this launch writes");
    if (access == Access::read) {
      cell.reader = another(cell.reader) ? launch_ | kMany : me;
      continue;
    }
    if (another(cell.reader)) return fault(at, "race", "which another block of this launch reads");
    cell.writer = me;
  }
  return {};
}

} // namespace kda::emulator
