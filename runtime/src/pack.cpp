// float64 <-> the bytes of a tensor.
#include "kda/case_io.h"
#include <cmath>
#include <cstring>
#include <limits>

namespace kda {
namespace {

/// A 16-bit float: sign, exponent, mantissa.
struct Format {
  int exponent_bits, mantissa_bits;
  [[nodiscard]] constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  [[nodiscard]] constexpr unsigned infinity() const { return ((1U << exponent_bits) - 1) << mantissa_bits; }
};
constexpr Format kBf16{8, 7}, kFp16{5, 10};

/// Rounded once, straight from float64, to nearest even; beyond the largest finite value to infinity.
std::uint16_t encode(double x, Format f) {
  const unsigned sign = std::signbit(x) ? 0x8000U : 0;
  if (std::isnan(x)) return static_cast<std::uint16_t>(sign | f.infinity() | (1U << (f.mantissa_bits - 1)));
  const double magnitude = std::abs(x);
  if (std::isinf(x) || magnitude >= std::ldexp(1.0, f.bias() + 1))
    return static_cast<std::uint16_t>(sign | f.infinity());
  int exponent = 1 - f.bias();
  if (magnitude != 0) exponent = std::max(exponent, std::ilogb(magnitude));
  // Units of the last place; the hidden bit, and a carry out of the mantissa, add themselves to the exponent.
  const auto units = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, f.mantissa_bits - exponent)));
  return static_cast<std::uint16_t>(
      sign | ((static_cast<unsigned>(exponent + f.bias() - 1) << f.mantissa_bits) + units));
}

double decode(std::uint16_t bits, Format f) {
  const int exponent = (bits & 0x7FFF) >> f.mantissa_bits;
  const int mantissa = bits & ((1 << f.mantissa_bits) - 1);
  double magnitude = 0;
  if (exponent == (1 << f.exponent_bits) - 1)
    magnitude =
        mantissa == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  else if (exponent == 0)
    magnitude = std::ldexp(mantissa, 1 - f.bias() - f.mantissa_bits);
  else
    magnitude = std::ldexp(mantissa + (1 << f.mantissa_bits), exponent - f.bias() - f.mantissa_bits);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

template <class Element, class Convert>
std::vector<std::byte> pack_as(const reference::Array& x, Convert convert) {
  std::vector<std::byte> out(x.size() * sizeof(Element));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const Element y = convert(x[i]);
    std::memcpy(&out[i * sizeof y], &y, sizeof y);
  }
  return out;
}

template <class Element, class Convert>
reference::Array unpack_as(const std::vector<std::byte>& bytes, Convert convert) {
  reference::Array out(bytes.size() / sizeof(Element));
  for (std::size_t i = 0; i < out.size(); ++i) {
    Element y;
    std::memcpy(&y, &bytes[i * sizeof y], sizeof y);
    out[i] = convert(y);
  }
  return out;
}

} // namespace

std::vector<std::byte> pack(const reference::Array& x, DType dtype) {
  switch (dtype) {
  case DType::bf16: return pack_as<std::uint16_t>(x, [](double y) { return encode(y, kBf16); });
  case DType::fp16: return pack_as<std::uint16_t>(x, [](double y) { return encode(y, kFp16); });
  case DType::fp32: break;
  }
  return pack_as<float>(x, [](double y) { return static_cast<float>(y); });
}

reference::Array unpack(const std::vector<std::byte>& bytes, safetensors::DType dtype) {
  const auto widen = [](auto y) { return static_cast<double>(y); };
  switch (dtype) {
  case safetensors::DType::f64: return unpack_as<double>(bytes, widen);
  case safetensors::DType::f32: return unpack_as<float>(bytes, widen);
  case safetensors::DType::f16:
    return unpack_as<std::uint16_t>(bytes, [](std::uint16_t y) { return decode(y, kFp16); });
  case safetensors::DType::bf16:
    return unpack_as<std::uint16_t>(bytes, [](std::uint16_t y) { return decode(y, kBf16); });
  case safetensors::DType::i64: return unpack_as<std::int64_t>(bytes, widen);
  case safetensors::DType::i32: break;
  }
  return unpack_as<std::int32_t>(bytes, widen);
}

reference::Array transposed(const reference::Array& x, int rows, int columns) {
  const auto r = static_cast<std::size_t>(rows), c = static_cast<std::size_t>(columns);
  reference::Array out(x.size());
  for (std::size_t base = 0; base + r * c <= x.size(); base += r * c)
    for (std::size_t i = 0; i < r; ++i)
      for (std::size_t j = 0; j < c; ++j)
        out[base + j * r + i] = x[base + i * c + j];
  return out;
}

safetensors::DType file_dtype(DType dtype) {
  switch (dtype) {
  case DType::bf16: return safetensors::DType::bf16;
  case DType::fp16: return safetensors::DType::f16;
  case DType::fp32: break;
  }
  return safetensors::DType::f32;
}

} // namespace kda
