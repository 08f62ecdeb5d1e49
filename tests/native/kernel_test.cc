// Every level of this CPU against a double-precision reference, on buffers of exact size.
//
// kernel_test [--quick] [LEVEL ...]: prints the number of cases of each level; exits with 1 and a
// description at the first that fails.

#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "half.h"
#include "layer_case.h"
#include "linear.h"

namespace qalora_test {
namespace {

using namespace qalora;

struct Case {
  int64_t bits, group, k, n, m;
  bool int8, half_x, half_parameters, bias, threads;
  double scale, far;
  uint64_t seed;
};

std::string Describe(const char* level, const Case& c) {
  char text[256];
  std::snprintf(text, sizeof text,
                "%s: bits %lld group %lld K %lld N %lld M %lld %s x %s s/z %s bias %d scale %g far "
                "%g seed %llu",
                level, static_cast<long long>(c.bits), static_cast<long long>(c.group),
                static_cast<long long>(c.k), static_cast<long long>(c.n),
                static_cast<long long>(c.m), c.int8 ? "int8" : "fp32", c.half_x ? "half" : "float",
                c.half_parameters ? "half" : "float", c.bias, c.scale, c.far,
                static_cast<unsigned long long>(c.seed));
  return text;
}

bool Serial(void*, void (*fn)(void*, size_t), size_t count, void* data) {
  for (size_t i = 0; i < count; ++i) fn(data, i);
  return true;
}

bool Threads(void*, void (*fn)(void*, size_t), size_t count, void* data) {
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 3; ++t) {
    threads.emplace_back([=] {
      for (size_t i = t; i < count; i += 3) fn(data, i);
    });
  }
  for (auto& thread : threads) thread.join();
  return true;
}

// Values as the kernel will read them: stored as float or half, kept as float.
struct Values {
  Block block;
  std::vector<float> value;
  Values(const std::vector<double>& wanted, bool half, size_t shift)
      : block(wanted.size() * (half ? 2 : 4), shift * (half ? 2 : 4)), value(wanted.size()) {
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (half) {
        const uint16_t bits = NearestHalf(wanted[i]);
        std::memcpy(block.data() + 2 * i, &bits, 2);
        value[i] = static_cast<float>(HalfValue(bits));
      } else {
        value[i] = static_cast<float>(wanted[i]);
        std::memcpy(block.data() + 4 * i, &value[i], 4);
      }
    }
  }
};

std::vector<double> Fill(int64_t count, Random* random, double low, double high) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = random->Uniform(low, high);
  return values;
}

// y and the admitted difference, for one output.
bool Near(double found, double expected, double size, bool half) {
  if (!std::isfinite(expected)) return true;
  double bound = 1e-6 * size * 4 + 1e-37;
  if (half) bound += std::fabs(expected) / 2048 + 6e-8;
  return std::fabs(found - expected) <= bound || (half && std::fabs(expected) > 65000);
}

bool Check(const char* level, const KernelSet* kernels, const Case& c) {
  const auto fail = [&](const std::string& why) {
    std::printf("FAILED %s: %s\n", Describe(level, c).c_str(), why.c_str());
    return false;
  };
  Layer layer;
  Error error;
  if (!CheckAttributes({c.k, c.n, c.bits, c.group, c.int8 ? "int8" : "fp32"}, &layer, &error)) {
    return fail(error.text);
  }
  Random random(c.seed);
  const size_t shift = static_cast<size_t>(random.Below(4));
  const double middle = (1 << c.bits) / 2.0;
  Block codes(static_cast<size_t>(layer.row_bytes() * c.n), shift);
  for (int64_t i = 0; i < layer.row_bytes() * c.n; ++i) {
    codes.data()[i] = static_cast<uint8_t>(random.Next() >> 20);
  }
  const int64_t parameters = c.n * layer.groups;
  Values x(Fill(c.m * c.k, &random, -1, 1), c.half_x, shift);
  Values scale(Fill(parameters, &random, 0.5 * c.scale, 1.5 * c.scale), c.half_parameters, shift);
  Values zero(Fill(parameters, &random, middle - 4 - c.far, middle + 4 + c.far), c.half_parameters,
              shift);
  Values bias(Fill(c.n, &random, -1, 1), c.half_x, shift);
  Block y(static_cast<size_t>(c.m * c.n) * (c.half_x ? 2 : 4), shift * (c.half_x ? 2 : 4));

  Linear linear;
  if (!linear.Init(layer, kernels)) return fail("Init");
  Tensors tensors;
  tensors.x = x.block.data();
  tensors.codes = codes.data();
  tensors.scale = scale.block.data();
  tensors.zero_point = zero.block.data();
  tensors.bias = c.bias ? bias.block.data() : nullptr;
  tensors.y = y.data();
  tensors.half_x = c.half_x;
  tensors.half_parameters = c.half_parameters;
  if (!linear.Run(tensors, c.m, {nullptr, c.threads ? Threads : Serial}, &error)) {
    return fail(error.text);
  }

  const std::vector<double> seen = Seen(layer, x.value);
  std::vector<double> level_of(static_cast<size_t>(c.k)), size_of(static_cast<size_t>(c.k));
  for (int64_t n = 0; n < c.n; ++n) {
    for (int64_t k = 0; k < c.k; ++k) {
      const int64_t at = n * layer.groups + k / c.group;
      const double code = ReadCode(codes.data() + n * layer.row_bytes(), layer, k);
      level_of[k] = scale.value[at] * (code - zero.value[at]);
      size_of[k] = std::fabs(scale.value[at]) * (code + std::fabs(zero.value[at]));
    }
    for (int64_t m = 0; m < c.m; ++m) {
      double expected = c.bias ? bias.value[n] : 0, size = std::fabs(expected);
      for (int64_t k = 0; k < c.k; ++k) {
        expected += seen[m * c.k + k] * level_of[k];
        size += std::fabs(seen[m * c.k + k]) * size_of[k];
      }
      const uint8_t* at = y.data() + (m * c.n + n) * (c.half_x ? 2 : 4);
      uint16_t half;
      float real;
      std::memcpy(&half, at, 2);
      if (!c.half_x) std::memcpy(&real, at, 4);
      const double found = c.half_x ? HalfValue(half) : real;
      if (!Near(found, expected, size, c.half_x)) {
        return fail("y[" + std::to_string(m) + ", " + std::to_string(n) + "] is " +
                    std::to_string(found) + ", not " + std::to_string(expected));
      }
    }
  }
  return true;
}

template <class T, size_t count>
T Pick(const T (&from)[count], Random* random) {
  return from[random->Below(count)];
}

Case Draw(uint64_t seed) {
  static const int64_t kBits[] = {2, 3, 4, 8}, kGroups[] = {16, 32, 48, 64, 96, 128, 256, 512};
  static const int64_t kRows[] = {0, 1, 1, 1, 2, 3, 4, 5, 7, 16, 17, 128, 129};
  static const double kScales[] = {1e-20, 1e-3, 1, 1e20}, kFar[] = {0, 0, 100, 1e4};
  Random random(seed + 7);
  Case c;
  c.bits = Pick(kBits, &random);
  c.group = Pick(kGroups, &random);
  c.m = Pick(kRows, &random);
  c.k = 1 + random.Below(c.m > 16 ? 150 : 700);
  c.n = 1 + random.Below(c.m > 16 ? 20 : 150);
  c.int8 = random.Below(2);
  c.half_x = random.Below(2);
  c.half_parameters = random.Below(2);
  c.bias = random.Below(2);
  c.threads = random.Below(8) == 0;
  const bool plain = c.half_x || c.half_parameters;  // binary16 has no room for extremes
  c.scale = plain ? 0.01 : Pick(kScales, &random);
  c.far = Pick(kFar, &random);
  c.seed = seed;
  return c;
}

// All 65536 halves widened, and their neighbourhoods narrowed.
bool CheckHalves(const KernelSet* kernels) {
  std::vector<uint16_t> halves(65536), back(65536);
  std::vector<float> floats(65536);
  for (int i = 0; i < 65536; ++i) halves[i] = static_cast<uint16_t>(i);
  kernels->widen(halves.data(), floats.data(), 65536);
  for (int i = 0; i < 65536; ++i) {
    const double wanted = HalfValue(halves[i]);
    const bool same = std::isnan(wanted) ? std::isnan(floats[i]) : floats[i] == wanted;
    if (!same || (std::isnan(wanted) ? !std::isnan(HalfToFloat(halves[i]))
                                     : HalfToFloat(halves[i]) != wanted)) {
      std::printf("FAILED %s: half %04x becomes %g\n", kernels->name, i, floats[i]);
      return false;
    }
  }
  Random random(5);
  for (int i = 0; i < 65536; ++i) {  // half way to the next one, and somewhere near
    const float next = HalfToFloat(static_cast<uint16_t>((i & 0x7fff) < 0x7c00 ? i + 1 : i));
    floats[i] = i % 2 ? (floats[i] + next) / 2
                      : floats[i] * static_cast<float>(random.Uniform(0.999, 1.001));
  }
  kernels->narrow(floats.data(), back.data(), 65536);
  for (int i = 0; i < 65536; ++i) {
    const uint16_t wanted = NearestHalf(floats[i]);
    const bool nan = std::isnan(floats[i]);
    const auto right = [&](uint16_t half) {
      return nan ? std::isnan(HalfValue(half)) : half == wanted;
    };
    if (!right(back[i]) || !right(FloatToHalf(floats[i]))) {
      std::printf("FAILED %s: %g becomes half %04x, not %04x\n", kernels->name, floats[i], back[i],
                  wanted);
      return false;
    }
  }
  return true;
}

int Main(int count, char** values) {
  bool quick = false;
  std::vector<std::string> levels;
  for (int i = 1; i < count; ++i) {
    if (std::string(values[i]) == "--quick") {
      quick = true;
    } else {
      levels.push_back(values[i]);
    }
  }
  if (levels.empty()) {
    std::string names = KernelNames();
    for (size_t at = 0; at != std::string::npos;) {
      const size_t comma = names.find(',', at);
      levels.push_back(names.substr(at, comma - at));
      at = comma == std::string::npos ? comma : comma + 1;
    }
  }
  const uint64_t cases = quick ? 400 : 4000;
  for (const std::string& level : levels) {
    const KernelSet* kernels = FindKernels(level.c_str());
    if (!kernels) {
      std::printf("FAILED: this CPU has no level %s, only %s\n", level.c_str(), KernelNames());
      return 1;
    }
    if (!CheckHalves(kernels)) return 1;
    for (uint64_t seed = 0; seed < cases; ++seed) {
      if (!Check(level.c_str(), kernels, Draw(seed))) return 1;
    }
    std::printf("%s: all halves, and %llu layers are right\n", level.c_str(),
                static_cast<unsigned long long>(cases));
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace qalora_test

int main(int count, char** values) { return qalora_test::Main(count, values); }
