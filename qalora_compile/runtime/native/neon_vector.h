// Vectors of Arm NEON, for the levels with dot products and with products of matrices.
#pragma once

#include <arm_neon.h>

#include "codec_template.h"

namespace qalora {
namespace {

struct Neon {
  using I = uint8x16_t;
  using F = float32x4_t;
  using Sum = int32x4_t;
  using Acc = int32x4_t;
  using Lanes = uint8x16_t;
  static constexpr int kStep = 16;
  static constexpr int kLanes = 4;
  static constexpr int kPanelDigits = 3;
  static constexpr int kWide = 4;
  static constexpr int kTall = 12;

  static I Load(const uint8_t* p) { return vld1q_u8(p); }
  static I LoadPartial(const uint8_t* p, int64_t count) {
    uint8_t bytes[16] = {};
    std::memcpy(bytes, p, count);
    return vld1q_u8(bytes);
  }
  static void Store(uint8_t* p, I a) { vst1q_u8(p, a); }
  static I SetBytes(int value) { return vdupq_n_u8(static_cast<uint8_t>(value)); }
  static I And(I a, I b) { return vandq_u8(a, b); }
  static I Or(I a, I b) { return vorrq_u8(a, b); }
  template <int bits>
  static I Shr(I a) {
    if constexpr (bits == 0) {
      return a;
    } else {
      return vshrq_n_u8(a, bits);
    }
  }
  template <int width, int index>
  static F Field(I a) {
    uint32x4_t word = vreinterpretq_u32_u8(a);
    if constexpr (index > 0) word = vshrq_n_u32(word, width * index);
    return vcvtq_f32_u32(vandq_u32(word, vdupq_n_u32((1u << width) - 1)));
  }
  template <int index>
  static F SmallByte(I a) { return Field<8, index>(a); }

  // The high bits of the 16 bytes.
  using High = HighWords<uint16_t>;
  template <int f>
  static I AddHigh(I codes, const High& high) {
    const uint8x8_t bit = vcreate_u8(0x8040201008040201ull);
    const uint8x16_t word = vcombine_u8(vdup_n_u8(static_cast<uint8_t>(high.bits[f])),
                                        vdup_n_u8(static_cast<uint8_t>(high.bits[f] >> 8)));
    return Or(codes, And(vtstq_u8(word, vcombine_u8(bit, bit)), SetBytes(4)));
  }

  static Acc ZeroAcc() { return vdupq_n_s32(0); }
  static I LoadX(const int8_t* x) { return vreinterpretq_u8_s8(vld1q_s8(x)); }
  static I BroadcastX(const int8_t* x) {
    uint32_t four;
    std::memcpy(&four, x, sizeof four);
    return vreinterpretq_u8_u32(vdupq_n_u32(four));
  }
  template <int bits>
  static Acc Seed(Sum total) { return vshlq_n_s32(total, 7); }
  // The instruction has no mixed signs. Codes of 8 bits: q = (q - 128) + 128, and 128 = 64 + 64 as
  // signed bytes.
  template <int bits>
  static Acc Dot(Acc acc, I codes, I x) {
    const int8x16_t value = vreinterpretq_s8_u8(x);
    if constexpr (bits < 8) return vdotq_s32(acc, vreinterpretq_s8_u8(codes), value);
    const int8x16_t half = vdupq_n_s8(64);
    acc = vdotq_s32(acc, vreinterpretq_s8_u8(veorq_u8(codes, SetBytes(0x80))), value);
    return vdotq_s32(vdotq_s32(acc, half, value), half, value);
  }
  template <int bits, bool more>
  static Sum Settle(Sum, Acc acc) { return acc; }
  static F ToFloat(Sum total) { return vcvtq_f32_s32(total); }
  static I Bits(F a) { return vreinterpretq_u8_f32(a); }
  static F Floats(I a) { return vreinterpretq_f32_u8(a); }
  static void Transpose(I (&rows)[4]) {
    const auto word = [&](int i) { return vreinterpretq_u32_u8(rows[i]); };
    const uint32x4x2_t low = vzipq_u32(word(0), word(2)), high = vzipq_u32(word(1), word(3));
    const uint32x4x2_t first = vzipq_u32(low.val[0], high.val[0]);
    const uint32x4x2_t second = vzipq_u32(low.val[1], high.val[1]);
    rows[0] = vreinterpretq_u8_u32(first.val[0]);
    rows[1] = vreinterpretq_u8_u32(first.val[1]);
    rows[2] = vreinterpretq_u8_u32(second.val[0]);
    rows[3] = vreinterpretq_u8_u32(second.val[1]);
  }

  static F ZeroF() { return vdupq_n_f32(0.0f); }
  static F SetF(float value) { return vdupq_n_f32(value); }
  static F LoadF(const float* p) { return vld1q_f32(p); }
  static void StoreF(float* p, F a) { vst1q_f32(p, a); }
  static F Mul(F a, F b) { return vmulq_f32(a, b); }
  static F Add(F a, F b) { return vaddq_f32(a, b); }
  static F Sub(F a, F b) { return vsubq_f32(a, b); }
  static F Negate(F a) { return vnegq_f32(a); }
  static F Fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F Max(F a, F b) { return vmaxq_f32(a, b); }
  static void StreamF(float* p, F a) { StoreF(p, a); }
  static void Fence() {}
  // The sum of the lanes of each, all in the same order.
  static Four Reduce4(F a, F b, F c, F d) { return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)); }
  // As the bytes of the lanes.
  static Lanes LoadLanes(const int32_t* lane) {
    const uint32x4_t index = vreinterpretq_u32_s32(vld1q_s32(lane));
    return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), index, 0x04040404));
  }
  static F Permute(F a, Lanes lane) {
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a), lane));
  }
  static F LoadParameter(const void* p, bool half, int64_t at, int64_t count) {
    uint16_t halves[4] = {};
    float floats[4] = {};
    if (half) {
      const uint16_t* from = static_cast<const uint16_t*>(p) + at;
      if (count < kLanes) {
        std::memcpy(halves, from, count * sizeof(uint16_t));
        from = halves;
      }
      return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
    }
    const float* from = static_cast<const float*>(p) + at;
    if (count < kLanes) {
      std::memcpy(floats, from, count * sizeof(float));
      from = floats;
    }
    return vld1q_f32(from);
  }
  // Always inlined: GCC takes a function that only prefetches for one without effect, and drops it.
  static inline __attribute__((always_inline)) void Prefetch(const void* p) {
    __builtin_prefetch(p);
  }

  static uint32_t LargestBits16(const float* x) {
    const uint32x4_t magnitude = vdupq_n_u32(0x7fffffffu);
    uint32x4_t largest = vdupq_n_u32(0);
    for (int i = 0; i < 16; i += 4) {
      largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), magnitude));
    }
    return vmaxvq_u32(largest);
  }
  static int32_t Round16(const float* x, float inverse, int32_t* out) {
    int32x4_t codes[4];
    for (int i = 0; i < 4; ++i) {
      codes[i] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4 * i), inverse));
      vst1q_s32(out + 4 * i, codes[i]);
    }
    return vaddvq_s32(vaddq_s32(vaddq_s32(codes[0], codes[1]), vaddq_s32(codes[2], codes[3])));
  }
  static void StoreHalf(uint16_t* to, F a) {
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(a)));
  }
};

}  // namespace
}  // namespace qalora
