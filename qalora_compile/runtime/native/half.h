// IEEE binary16 as bits, for levels and loops without conversion instructions.
//
// Static: the header is compiled into files with different instruction sets, and a shared inline
// function would be merged to whichever copy the linker meets first.
#pragma once

#include <cstdint>
#include <cstring>

namespace qalora {

static inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    bits = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    if (magnitude > 0x7c00u) bits |= 0x400000u;  // quiet, as the instructions make it
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + ((127u - 15u) << 23);
  } else {  // zero, subnormal: magnitude * 2^-24, exact in float
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Rounds to nearest, ties to even; what is too large becomes infinity.
static inline uint16_t FloatToHalf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  }
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and up
  if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  const uint32_t odd = (bits >> 13) & 1u;
  bits += 0xfffu + odd;
  return static_cast<uint16_t>(sign | ((bits - ((127u - 15u) << 23)) >> 13));
}

}  // namespace qalora
