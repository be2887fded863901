// TMA boxes and wgmma operands. Layouts: PTX ISA, "Tensor" and "Asynchronous warpgroup level matrix".
#include "async.h"
#include "number.h"
#include <cstring>
#include <fmt/format.h>

namespace kda::emulator {
namespace {

/// The 16-byte pieces of 128 bytes change places by the number of the 128 bytes.
std::size_t swizzled(std::size_t address, int swizzle_bytes) {
  const std::size_t mask = swizzle_bytes == 0 ? 0 : static_cast<std::size_t>(swizzle_bytes) / 16 - 1;
  return address ^ ((address >> 7 & mask) << 4);
}

long box_bytes(const TensorMapFields& map) {
  long bytes = map.element_bytes;
  for (int i = 0; i < map.dimensions; ++i)
    bytes *= map.box[i];
  return bytes;
}

/// Every element of a tensor copy: where it lies in global and in shared memory, and whether the tensor has
/// it.
template <class Visit>
void each_element(const PendingBulk& bulk, const Visit& visit) {
  const TensorMapFields& map = bulk.map;
  const auto size = static_cast<std::size_t>(map.element_bytes);
  const auto elements = static_cast<std::size_t>(box_bytes(map)) / size;
  for (std::size_t e = 0; e < elements; ++e) {
    unsigned char* global = map.base;
    bool inside = true;
    std::size_t rest = e;
    for (int i = 0; i < map.dimensions; ++i) {
      const long at = bulk.copy.at[i] + static_cast<long>(rest % map.box[i]);
      rest /= map.box[i];
      inside = inside && at >= 0 && at < static_cast<long>(map.size[i]);
      global += at * static_cast<long>(i == 0 ? size : map.stride[i - 1]);
    }
    visit(global, e * size, size, inside);
  }
}

void run_tensor(const PendingBulk& bulk, const SharedView& shared) {
  const auto start = static_cast<std::size_t>(static_cast<unsigned char*>(bulk.copy.shared) - shared.data);
  each_element(bulk, [&](unsigned char* global, std::size_t at, std::size_t size, bool inside) {
    unsigned char* const to = shared.data + swizzled(start + at, bulk.map.swizzle_bytes);
    if (bulk.copy.mbarrier == nullptr) {
      if (inside) std::memcpy(global, to, size);
    } else if (inside) {
      std::memcpy(to, global, size);
    } else {
      std::memset(to, 0, size);
    }
  });
}

/// One shared operand of wgmma, described by its 64 bits.
class Operand {
public:
  Operand(unsigned long long descriptor, bool transposed, Element element)
      : transposed_(transposed), size_(element == Element::tf32 ? 4 : 2), start_((descriptor & 0x3fff) << 4),
        leading_((descriptor >> 16 & 0x3fff) << 4), stride_((descriptor >> 32 & 0x3fff) << 4) {
    constexpr int kSpans[4] = {0, 128, 64, 32};
    swizzle_ = kSpans[descriptor >> 62];
  }
  /// Byte of element (row m or n, k) in shared memory.
  [[nodiscard]] std::size_t at(std::size_t row, std::size_t k) const {
    const auto span = static_cast<std::size_t>(swizzle_);
    if (!transposed_) {
      const std::size_t byte = k * size_;
      if (swizzle_ == 0) return start_ + row % 8 * 16 + row / 8 * stride_ + byte / 16 * leading_ + byte % 16;
      return swizzled(start_ + row % 8 * span + row / 8 * stride_ + byte, swizzle_);
    }
    const std::size_t byte = row * size_;
    if (swizzle_ == 0) return start_ + k % 8 * 16 + k / 8 * leading_ + byte / 16 * stride_ + byte % 16;
    return swizzled(start_ + k % 8 * span + k / 8 * stride_ + byte / span * leading_ + byte % span, swizzle_);
  }
  [[nodiscard]] std::size_t size() const { return size_; }

private:
  bool transposed_;
  std::size_t size_, start_, leading_, stride_;
  int swizzle_ = 0;
};

float value(Element element, unsigned bits) {
  if (element == Element::bf16) return bf16_value(bits);
  return element == Element::fp16 ? fp16_value(bits) : tf32_value(bits);
}

std::string load(const Operand& operand, Element element, std::size_t rows, std::size_t depth,
                 const SharedView& shared, std::vector<float>& to) {
  for (std::size_t row = 0; row < rows; ++row)
    for (std::size_t k = 0; k < depth; ++k) {
      const std::size_t at = operand.at(row, k);
      if (at + operand.size() > shared.bytes)
        return fmt::format("wgmma reads byte {} of shared memory, which has {}", at, shared.bytes);
      unsigned bits = 0;
      std::memcpy(&bits, shared.data + at, operand.size());
      to[row * depth + k] = value(element, bits);
    }
  return {};
}

void load_registers(const WgmmaArguments* arguments, std::size_t depth, std::vector<float>& a) {
  for (std::size_t t = 0; t < 128; ++t) {
    const std::size_t row = t / 32 * 16 + t % 32 / 4, column = t % 4;
    for (std::size_t i = 0; i < 4; ++i) {
      const unsigned word = arguments[t].a[i];
      float* const at = &a[(row + i % 2 * 8) * depth];
      if (arguments[0].element == Element::tf32) {
        at[column + i / 2 * 4] = tf32_value(word);
        continue;
      }
      at[2 * column + i / 2 * 8] = value(arguments[0].element, word & 0xffffU);
      at[2 * column + i / 2 * 8 + 1] = value(arguments[0].element, word >> 16);
    }
  }
}

template <class Visit>
void each_accumulator(const WgmmaArguments* arguments, Visit visit) {
  const int n = arguments[0].n;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < n / 2; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      visit(arguments[t].d[i],
            static_cast<std::size_t>(row) * static_cast<std::size_t>(n) + static_cast<std::size_t>(column));
    }
}

} // namespace

std::string check(const BulkCopy& copy, const TensorMapFields& map, const SharedView& shared) {
  const bool tensor = copy.map != nullptr;
  if (tensor && (map.mark != kTensorMapMark || map.dimensions != copy.dimensions))
    return fmt::format("the tensor map is none of {} dimensions", copy.dimensions);
  const long bytes = tensor ? box_bytes(map) : static_cast<long>(copy.bytes);
  const auto offset = static_cast<unsigned char*>(copy.shared) - shared.data;
  const long alignment = tensor ? 128 : 16;
  if (offset < 0 || offset + bytes > static_cast<long>(shared.bytes))
    return fmt::format("{} bytes at byte {} of shared memory, which has {}", bytes, offset, shared.bytes);
  if (offset % alignment != 0 || bytes % 16 != 0 ||
      (!tensor && reinterpret_cast<std::uintptr_t>(copy.global) % 16 != 0))
    return fmt::format("{} bytes at byte {}: {}-byte aligned shared memory, a multiple of 16 bytes", bytes,
                       offset, alignment);
  return {};
}

long counted_bytes(const PendingBulk& bulk) {
  return bulk.copy.map != nullptr ? box_bytes(bulk.map) : static_cast<long>(bulk.copy.bytes);
}

void run(const PendingBulk& bulk, const SharedView& shared) {
  const BulkCopy& copy = bulk.copy;
  if (copy.map != nullptr) return run_tensor(bulk, shared);
  if (copy.mbarrier != nullptr)
    std::memcpy(copy.shared, copy.global, copy.bytes);
  else
    std::memcpy(copy.global, copy.shared, copy.bytes);
}

void each_global(const PendingBulk& bulk, const std::function<void(unsigned char*, std::size_t)>& visit) {
  if (bulk.copy.map == nullptr) return visit(static_cast<unsigned char*>(bulk.copy.global), bulk.copy.bytes);
  each_element(bulk, [&](unsigned char* global, std::size_t, std::size_t size, bool inside) {
    if (inside) visit(global, size);
  });
}

std::vector<float> read_accumulators(const WgmmaArguments* arguments) {
  std::vector<float> d(64 * static_cast<std::size_t>(arguments[0].n));
  each_accumulator(arguments, [&](float& own, std::size_t at) { d[at] = own; });
  return d;
}

void write_accumulators(const WgmmaArguments* arguments, const std::vector<float>& d) {
  each_accumulator(arguments, [&](float& own, std::size_t at) { own = d[at]; });
}

void each_operand(const WgmmaArguments* arguments,
                  const std::function<void(std::size_t, std::size_t)>& visit) {
  const WgmmaArguments& first = arguments[0];
  const std::size_t depth = first.element == Element::tf32 ? 8 : 16, n = static_cast<std::size_t>(first.n);
  const auto each = [&](const Operand& operand, std::size_t rows) {
    for (std::size_t row = 0; row < rows; ++row)
      for (std::size_t k = 0; k < depth; ++k)
        visit(operand.at(row, k), operand.size());
  };
  if (!first.a_in_registers) each(Operand(first.a_descriptor, first.a_transposed, first.element), 64);
  each(Operand(first.b_descriptor, first.b_transposed, first.element), n);
}

std::string run(const WgmmaArguments* arguments, std::vector<float>& d, const SharedView& shared) {
  const WgmmaArguments& first = arguments[0];
  const std::size_t depth = first.element == Element::tf32 ? 8 : 16, n = static_cast<std::size_t>(first.n);
  std::vector<float> a(64 * depth), b(n * depth);
  if (first.a_in_registers)
    load_registers(arguments, depth, a);
  else if (std::string wrong = load(Operand(first.a_descriptor, first.a_transposed, first.element),
                                    first.element, 64, depth, shared, a);
           !wrong.empty())
    return wrong;
  if (std::string wrong = load(Operand(first.b_descriptor, first.b_transposed, first.element), first.element,
                               n, depth, shared, b);
      !wrong.empty())
    return wrong;
  for (std::size_t row = 0; row < 64; ++row)
    for (std::size_t column = 0; column < n; ++column) {
      float sum = first.accumulate ? d[row * n + column] : 0.F;
      for (std::size_t k = 0; k < depth; ++k)
        sum += (first.negate ? -a[row * depth + k] : a[row * depth + k]) * b[column * depth + k];
      d[row * n + column] = sum;
    }
  return {};
}

} // namespace kda::emulator
