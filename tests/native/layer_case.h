// One layer with random contents, and what it has to compute, for kernel_test.cc.
//
// Written from docs/operators.md alone: nothing here shares code with the library's kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "layer.h"

namespace qalora_test {

// A small generator, the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435769u + 88172645463325252u) {}
  uint64_t Next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  int64_t Below(int64_t bound) { return static_cast<int64_t>(Next() >> 11) % bound; }
  double Uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(Next() >> 11) / 9007199254740992.0;
  }

 private:
  uint64_t state_;
};

// Bytes on the heap at their exact size, so that AddressSanitizer sees a read or write past an end.
// `shift` moves the start off the allocation's alignment.
class Block {
 public:
  Block(size_t bytes, size_t shift)
      : memory_(static_cast<uint8_t*>(std::malloc(bytes + shift + (bytes + shift == 0)))),
        shift_(shift) {}
  ~Block() { std::free(memory_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  uint8_t* data() { return memory_ + shift_; }

 private:
  uint8_t* memory_;
  size_t shift_;
};

// binary16 from its definition, slow and plain.
inline double HalfValue(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const double fraction = half & 1023;
  const double sign = half & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

// The nearest binary16, ties to even, found by bisection over the positive ones.
inline uint16_t NearestHalf(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
  int low = 0, high = 0x7bff;
  while (low < high) {  // the largest that is not above
    const int middle = (low + high + 1) / 2;
    if (HalfValue(static_cast<uint16_t>(middle)) <= size) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const double below = HalfValue(static_cast<uint16_t>(low));
  const double above = low == 0x7bff ? 65536.0 : HalfValue(static_cast<uint16_t>(low + 1));
  const double half_way = (below + above) / 2;
  const bool up = size > half_way || (size == half_way && (low & 1));
  return static_cast<uint16_t>(sign | (low + (up ? 1 : 0)));
}

// Code k of a row of bytes, by the written rule.
inline int ReadCode(const uint8_t* row, const qalora::Layer& layer, int64_t k) {
  const auto bit = [row](int64_t at) { return row[at / 8] >> (at % 8) & 1; };
  int code = 0;
  if (layer.bits != 3) {
    for (int i = 0; i < layer.bits; ++i) code |= bit(k * layer.bits + i) << i;
    return code;
  }
  const int64_t low_bytes = layer.groups * layer.group_size / 4;
  const int64_t byte = k / 4, field = k % 4, unit = byte / 64;
  const int64_t size = low_bytes - 64 * unit < 64 ? low_bytes - 64 * unit : 64;
  const int64_t start = 8 * low_bytes + 256 * unit;
  return bit(2 * k) | bit(2 * k + 1) << 1 | bit(start + field * size + byte % 64) << 2;
}

// x as the layer computes with it: itself, or what its int8 codes stand for.
inline std::vector<double> Seen(const qalora::Layer& layer, const std::vector<float>& x) {
  std::vector<double> seen(x.begin(), x.end());
  if (!layer.int8) return seen;
  const int64_t block = layer.group_size % 32 == 0 ? 32 : 16;
  const int64_t rows = static_cast<int64_t>(x.size()) / layer.k;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t begin = 0; begin < layer.k; begin += block) {
      const int64_t end = begin + block < layer.k ? begin + block : layer.k;
      float largest = 0;
      for (int64_t k = begin; k < end; ++k) largest = std::fmax(largest, std::fabs(x[m * layer.k + k]));
      const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
      for (int64_t k = begin; k < end; ++k) {
        const double code = std::nearbyint(x[m * layer.k + k] * inverse);
        seen[m * layer.k + k] = code * static_cast<double>(largest / 127.0f);
      }
    }
  }
  return seen;
}

}  // namespace qalora_test
