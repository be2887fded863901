#pragma once
// The operands of the tensor unit as floats.

namespace kda::emulator {

inline float bf16_value(unsigned bits) {
  return __builtin_bit_cast(float, bits << 16);
}
inline float fp16_value(unsigned bits) {
  const unsigned magnitude = (bits & 0x7fffU) << 13, sign = (bits & 0x8000U) << 16;
  // Times 2^112 moves the exponent and makes denormals normal; infinity and NaN keep theirs.
  const float moved = magnitude >= 0x0f800000U ? __builtin_bit_cast(float, magnitude | 0x7f800000U)
                                               : __builtin_bit_cast(float, magnitude) * 0x1p112F;
  return __builtin_bit_cast(float, __builtin_bit_cast(unsigned, moved) | sign);
}
/// The tensor unit ignores the low 13 bits.
inline float tf32_value(unsigned bits) {
  return __builtin_bit_cast(float, bits & 0xffffe000U);
}

} // namespace kda::emulator
