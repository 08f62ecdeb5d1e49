#include "half_test.h"

#include <cmath>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include "dispatch.h"
#include "half.h"
#include "reference.h"

namespace qalora_test {
namespace {

uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

bool Differ(const char* what, uint64_t input, uint64_t got, uint64_t wanted) {
  std::printf("FAILED half: %s of 0x%llx gives 0x%llx, expected 0x%llx\n", what,
              static_cast<unsigned long long>(input), static_cast<unsigned long long>(got),
              static_cast<unsigned long long>(wanted));
  return false;
}

// Every half as a float, and back. A signalling NaN comes out quiet.
bool TestWidening() {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const double wanted = HalfValue(static_cast<uint16_t>(half));
    const float got = qalora::HalfToFloat(static_cast<uint16_t>(half));
    const bool nan = std::isnan(wanted);
    const uint32_t bits = nan ? (half & 0x8000u) << 16 | 0x7fc00000u | (half & 0x3ffu) << 13
                              : Bits(static_cast<float>(wanted));
    if (Bits(got) != bits) return Differ("HalfToFloat", half, Bits(got), bits);
    const uint32_t back = qalora::FloatToHalf(got), same = nan ? half | 0x200u : half;
    if (back != same) return Differ("FloatToHalf(HalfToFloat)", half, back, same);
  }
  return true;
}

// Around every half and every middle between two, where rounding changes, and floats of any bits.
std::vector<float> Floats(bool quick) {
  std::vector<float> list = {0.0f,    -0.0f,    65504.0f, 65519.996f, 65520.0f, 65536.0f, 3.4e38f,
                             1e-45f,  -1e-45f,  INFINITY, -INFINITY,  NAN,      -NAN,
                             FromBits(0x7f800001u), FromBits(0xffffffffu), FromBits(0x7fffe000u)};
  for (uint16_t half = 0; half < 0x7c00; ++half) {
    const double low = HalfValue(half);
    const double high = half == 0x7bff ? 65536.0 : HalfValue(static_cast<uint16_t>(half + 1));
    for (const double center : {low, (low + high) / 2}) {
      const float value = static_cast<float>(center);
      const float before = std::nextafterf(value, -1.0f), behind = std::nextafterf(value, 1e9f);
      for (const float near : {before, value, behind}) list.push_back(half % 2 ? near : -near);
    }
  }
  Rng rng(7);
  const int count = quick ? 20000 : 1000000;
  for (int i = 0; i < count; ++i) list.push_back(FromBits(static_cast<uint32_t>(rng.Next() >> 32)));
  return list;
}

bool TestNarrowing(const std::vector<float>& floats) {
  for (const float value : floats) {
    const uint32_t bits = Bits(value);
    const uint32_t nan = (bits >> 16 & 0x8000u) | 0x7e00u | (bits >> 13 & 0x3ffu);
    const uint32_t wanted = std::isnan(value) ? nan : NearestHalf(value);
    const uint32_t got = qalora::FloatToHalf(value);
    if (got != wanted) return Differ("FloatToHalf", bits, got, wanted);
  }
  return true;
}

// `count` values from `first` on, from and to buffers of their exact size.
bool TestLevelWiden(const qalora::KernelSet& level, int64_t first, int64_t count) {
  std::vector<uint16_t> halves;
  for (int64_t i = 0; i < count; ++i) halves.push_back(static_cast<uint16_t>(first + i));
  const Exact from(halves.data(), count * sizeof(uint16_t), sizeof(uint16_t));
  const Exact to(nullptr, count * sizeof(float), sizeof(float));
  level.widen(reinterpret_cast<const uint16_t*>(from.data()), reinterpret_cast<float*>(to.data()),
              count);
  const float* got = reinterpret_cast<const float*>(to.data());
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t wanted = Bits(qalora::HalfToFloat(halves[i]));
    if (Bits(got[i]) != wanted) return Differ(level.name, halves[i], Bits(got[i]), wanted);
  }
  return true;
}

bool TestLevelNarrow(const qalora::KernelSet& level, const float* values, int64_t count) {
  const Exact from(values, count * sizeof(float), sizeof(float));
  const Exact to(nullptr, count * sizeof(uint16_t), sizeof(uint16_t));
  level.narrow(reinterpret_cast<const float*>(from.data()), reinterpret_cast<uint16_t*>(to.data()),
               count);
  const uint16_t* got = reinterpret_cast<const uint16_t*>(to.data());
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t wanted = qalora::FloatToHalf(values[i]);
    if (got[i] != wanted) return Differ(level.name, Bits(values[i]), got[i], wanted);
  }
  return true;
}

bool TestLevel(const qalora::KernelSet& level, const std::vector<float>& floats) {
  const int64_t size = static_cast<int64_t>(floats.size());
  if (!TestLevelWiden(level, 0, 0x10000) || !TestLevelNarrow(level, floats.data(), size)) {
    return false;
  }
  for (int64_t count = 0; count < 70; ++count) {  // tails of every length
    if (!TestLevelWiden(level, 0x3bf0, count)) return false;
    if (!TestLevelNarrow(level, floats.data() + 100, count)) return false;
  }
  return true;
}

}  // namespace

bool TestHalf(bool quick, int64_t* checks) {
  const std::vector<float> floats = Floats(quick);
  if (!TestWidening() || !TestNarrowing(floats)) return false;
  std::istringstream names(qalora::KernelNames());
  int64_t levels = 0;
  for (std::string name; std::getline(names, name, ','); ++levels) {
    if (!TestLevel(*qalora::FindKernels(name.c_str()), floats)) return false;
  }
  *checks = (levels + 1) * (0x10000 + static_cast<int64_t>(floats.size()));
  return true;
}

}  // namespace qalora_test
