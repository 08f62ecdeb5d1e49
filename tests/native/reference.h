// One layer with its data, and what it should give, worked out in double and one code at a time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "layer.h"
#include "support.h"

namespace qalora_test {

// What the numbers look like. All but kNotFinite give finite float32 results.
enum class Values {
  kPlain,
  kTiny,       // scales around 1e-20
  kHuge,       // scales around 1e20
  kMixed,      // both, and everything between, in one row
  kFarZero,    // zero-points around 1e4, where codes are at most 255
  kSpread,     // x from 2^-110 to 2^20, and blocks of zeros
  kTies,       // values that rounding to one digit finds halfway
  kNotFinite,  // kPlain with infinities and NaNs in some rows of x and of the weight
};

struct Spec {
  int bits = 4;
  int64_t group = 32, k = 1, n = 1, m = 1;
  int digits = 3;  // 3: fp32, 2: int16, 1: int8
  bool half_x = false, half_parameters = false, bias = false;
  Values values = Values::kPlain;
  uint64_t seed = 1;

  qalora::Layer layer() const;
  std::string text() const;
};

// Values as the model gives them: those of float16 tensors are values that float16 has.
struct Data {
  std::vector<float> x, scale, zero_point, bias;
  std::vector<uint8_t> codes;
  std::vector<bool> skip_row, skip_column;  // with something in it that is not finite
};

struct Expected {
  std::vector<double> y, tolerance;  // [M, N]
};

Data MakeData(const Spec& spec);
Expected Reference(const Spec& spec, const Data& data);

// IEEE binary16 by its definition, without tricks on bits.
double HalfValue(uint16_t half);
// The nearest half, ties to the even one; infinity from 65520 on. `value` is no NaN.
uint16_t NearestHalf(double value);

}  // namespace qalora_test
