// The level that every CPU takes: a "vector" is one 32-bit word.

#include <cmath>

#include "half.h"
#include "kernel_template.h"

namespace qalora {
namespace {

// As HighWords, for a step of four bytes.
struct HighNibbles {
  uint32_t bits[4];

  static HighNibbles Load(const uint8_t* unit, int64_t size, int64_t first, bool) {
    HighNibbles high;
    for (int f = 0; f < 4; ++f) {
      high.bits[f] = static_cast<uint32_t>(HighBits(unit, size, first, f, 4));
    }
    return high;
  }
};

struct Scalar {
  using I = uint32_t;
  using F = float;
  using Sum = uint32_t;  // wraps on its way, fits at the end
  using Acc = uint32_t;
  struct Lanes {};
  static constexpr int kStep = 4;
  static constexpr int kLanes = 1;
  static constexpr int kPanelDigits = 1;
  static constexpr int kWide = 1;
  static constexpr int kTall = 4;

  // The code of byte i in bits 8i and up, whatever the machine's byte order.
  static I LoadPartial(const uint8_t* p, int64_t count) {
    I word = 0;
    for (int64_t i = 0; i < count; ++i) word |= static_cast<I>(p[i]) << (8 * i);
    return word;
  }
  static I Load(const uint8_t* p) { return LoadPartial(p, 4); }
  static void Store(uint8_t* p, I a) { for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(a >> (8 * i)); }
  static I SetBytes(int value) { return static_cast<I>(value) * 0x01010101u; }
  static I And(I a, I b) { return a & b; }
  template <int bits>
  static I Shr(I a) { return a >> bits; }
  template <int width, int index>
  static F Field(I a) {
    return static_cast<float>((a >> (width * index)) & ((1u << width) - 1));
  }
  template <int index>
  static F SmallByte(I a) { return Field<8, index>(a); }

  // The high bits of the four bytes.
  using High = HighNibbles;
  template <int f>
  static I AddHigh(I codes, const High& high) {
    const uint32_t bits = high.bits[f];
    return codes | ((bits & 1) | (bits & 2) << 7 | (bits & 4) << 14 | (bits & 8) << 21) << 2;
  }

  static Acc ZeroAcc() { return 0; }
  static I LoadX(const int8_t* x) { return Load(reinterpret_cast<const uint8_t*>(x)); }
  static I BroadcastX(const int8_t* x) { return LoadX(x); }
  template <int bits>
  static Acc Dot(Acc acc, I codes, I x) {
    for (int i = 0; i < 4; ++i) {
      const int32_t digit = static_cast<int8_t>(x >> (8 * i) & 0xff);
      acc += static_cast<uint32_t>(static_cast<int32_t>(codes >> (8 * i) & 0xff) * digit);
    }
    return acc;
  }
  template <int bits>
  static Acc Seed(Sum total) { return total << 7; }
  template <int bits, bool more>
  static Sum Settle(Sum, Acc acc) { return acc; }
  static F ToFloat(Sum total) { return static_cast<float>(static_cast<int32_t>(total)); }
  static I Bits(F a) {
    I bits;
    std::memcpy(&bits, &a, sizeof bits);
    return bits;
  }
  static F Floats(I a) { return FromBits(a); }
  static void Transpose(I (&)[1]) {}

  static F ZeroF() { return 0.0f; }
  static F SetF(float value) { return value; }
  static F LoadF(const float* p) { return *p; }
  static void StoreF(float* p, F a) { *p = a; }
  static F Mul(F a, F b) { return a * b; }
  static F Add(F a, F b) { return a + b; }
  static F Sub(F a, F b) { return a - b; }
  static F Negate(F a) { return -a; }
  static F Fma(F a, F b, F c) { return a * b + c; }
  static F Max(F a, F b) { return a > b ? a : b; }
  static void StreamF(float* p, F a) { *p = a; }
  static void Fence() {}
  static Four Reduce4(F a, F b, F c, F d) { return Four{a, b, c, d}; }
  static Lanes LoadLanes(const int32_t*) { return {}; }
  static F Permute(F a, Lanes) { return a; }
  static F LoadParameter(const void* p, bool half, int64_t at, int64_t) {
    return half ? HalfToFloat(static_cast<const uint16_t*>(p)[at])
                : static_cast<const float*>(p)[at];
  }
  static void Prefetch(const void*) {}

  static uint32_t LargestBits16(const float* x) {
    uint32_t largest = 0;
    for (int i = 0; i < 16; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      bits &= 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    return largest;
  }
  static int32_t Round16(const float* x, float inverse, int32_t* out) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) {
      out[i] = static_cast<int32_t>(std::lrint(x[i] * inverse));
      sum += out[i];
    }
    return sum;
  }
  static void StoreHalf(uint16_t* to, F a) {
    *to = FloatToHalf(a);
  }
};

}  // namespace

const KernelSet kScalarKernels = MakeKernels<Scalar>("scalar");

}  // namespace qalora
