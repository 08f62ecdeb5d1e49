#include "reference.h"

#include <algorithm>
#include <cmath>

namespace qalora_test {
namespace {

constexpr double kEpsilon = 0x1p-24;  // half an ulp of 1 in float32
// What the kernels may lose, in units of sum(|x| * scale * (code + |zero_point|)) * kEpsilon. Sums
// have up to some hundred terms in a lane; 7 is the most that was seen.
constexpr double kUnits = 50;
// Products below float32's smallest normal number lose digits, or vanish.
constexpr double kFloor = 1e-37;

int Bit(const uint8_t* row, int64_t index) { return row[index / 8] >> (index % 8) & 1; }

// Code k of a row, bit by bit as docs/reference/operators.md and ir/group_packing.py describe the layout.
int Code(const uint8_t* row, const qalora::Layer& layer, int64_t k) {
  int code = 0;
  if (layer.bits != 3) {
    for (int b = 0; b < layer.bits; ++b) code |= Bit(row, k * layer.bits + b) << b;
    return code;
  }
  const int64_t low_bytes = layer.padded_k() / 4;
  const int64_t unit = k / 256, size = std::min<int64_t>(64, low_bytes - unit * 64);
  const int64_t high = low_bytes * 8 + unit * 256 + k % 4 * size + k / 4 % 64;
  return Bit(row, 2 * k) | Bit(row, 2 * k + 1) << 1 | Bit(row, high) << 2;
}

float Rounded(double value, bool half) {
  return static_cast<float>(half ? HalfValue(NearestHalf(value)) : value);
}

double Power(Rng* rng, int low, int high) {
  const double exponent = static_cast<double>(rng->Between(low, high));
  return std::pow(10.0, exponent) * (1.5 + 0.5 * rng->Uniform());
}

double DrawX(const Spec& spec, int64_t k, Rng* rng, int* exponent) {
  if (spec.values == Values::kTies) {
    // The first of each block fixes the scale at exactly 1.
    return k % 16 == 0 ? 127.0 : static_cast<double>(rng->Between(-126, 125)) + 0.5;
  }
  if (spec.values == Values::kSpread) {
    const int low = spec.half_x ? -24 : -110, high = spec.half_x ? 4 : 20;
    if (k % 16 == 0) *exponent = static_cast<int>(rng->Between(low - 3, high));
    return *exponent < low ? 0.0 : std::ldexp(rng->Uniform(), *exponent);
  }
  return rng->Uniform();
}

double DrawScale(const Spec& spec, Rng* rng) {
  const bool half = spec.half_parameters;
  switch (spec.values) {
    case Values::kTiny: return half ? Power(rng, -7, -6) : Power(rng, -20, -19);
    case Values::kHuge: return half ? Power(rng, 3, 4) : Power(rng, 19, 20);
    case Values::kMixed: return half ? Power(rng, -6, 4) : Power(rng, -20, 20);
    default: return Power(rng, -3, -1);
  }
}

double DrawZero(const Spec& spec, Rng* rng) {
  if (spec.values == Values::kFarZero) return 1e4 * rng->Uniform();
  const double middle = static_cast<double>(1 << (spec.bits - 1));
  return rng->OneIn(4) ? 0.0 : middle + middle * rng->Uniform();  // real-valued, often inside
}

// Infinities and NaNs in a row of x and, half of the time, in a row of the weight.
void Spoil(const Spec& spec, Rng* rng, Data* data) {
  const float bad[] = {INFINITY, -INFINITY, NAN};
  const int64_t row = rng->Below(spec.m), column = rng->Below(spec.n);
  data->x[row * spec.k + rng->Below(spec.k)] = rng->Pick(bad);
  data->skip_row[row] = true;
  if (rng->OneIn(2)) return;
  const int64_t groups = spec.layer().groups;
  auto& list = rng->OneIn(2) ? data->scale : data->zero_point;
  list[column * groups + rng->Below(groups)] = rng->Pick(bad);
  if (spec.bias && rng->OneIn(2)) data->bias[column] = rng->Pick(bad);
  data->skip_column[column] = true;
}

// One row of x as one digit sees it, by the rules in prepare_template.h: blocks of 32, or 16 where
// the group size is no multiple of 32; the largest value becomes 127, and values are rounded to the
// nearest integer, ties to even, each operation in float32. Blocks below 2^-100 are zero.
void Round(const float* x, int64_t k, int64_t block, double* out) {
  for (int64_t begin = 0; begin < k; begin += block) {
    const int64_t end = std::min(begin + block, k);
    float largest = 0.0f;
    for (int64_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float scale = largest / 127.0f, inverse = 127.0f / largest;
    for (int64_t i = begin; i < end; ++i) {
      const float scaled = x[i] * inverse;
      out[i] = largest < 0x1p-100f ? 0.0 : std::nearbyint(scaled) * static_cast<double>(scale);
    }
  }
}

std::vector<double> Activations(const Spec& spec, const Data& data) {
  std::vector<double> x(data.x.begin(), data.x.end());
  if (spec.digits > 1) return x;
  for (int64_t row = 0; row < spec.m; ++row) {
    if (data.skip_row[row]) continue;
    Round(&data.x[row * spec.k], spec.k, spec.layer().block(), &x[row * spec.k]);
  }
  return x;
}

// What two and three digits may lose of each value of a row: a part of the largest in its block, and
// blocks below 2^-100 (docs/reference/operators.md states the bounds). Kernels may lose less, many rows are
// multiplied in float32 where that is faster.
std::vector<double> Lost(const Spec& spec, const Data& data) {
  std::vector<double> lost(spec.m * spec.k, 0.0);
  const int64_t block = spec.layer().block();
  const double part = spec.digits == 3 ? 0x1p-21 : 1.0 / 32000;
  for (int64_t row = 0; spec.digits > 1 && row < spec.m; ++row) {
    for (int64_t begin = 0; begin < spec.k; begin += block) {
      const int64_t end = std::min(begin + block, spec.k);
      double largest = 0.0;
      for (int64_t i = begin; i < end; ++i) {
        largest = std::max(largest, std::fabs(static_cast<double>(data.x[row * spec.k + i])));
      }
      const double bound = largest < 0x1p-100 ? largest : largest * part;
      for (int64_t i = begin; i < end; ++i) lost[row * spec.k + i] = bound;
    }
  }
  return lost;
}

const char* Name(Values values) {
  const char* const names[] = {"plain", "tiny",   "huge", "mixed",
                               "far-zero", "spread", "ties", "not-finite"};
  return names[static_cast<int>(values)];
}

}  // namespace

double HalfValue(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double sign = half & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

uint16_t NearestHalf(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (magnitude >= 65520.0) return sign | 0x7c00;
  // The largest finite half that is not above, by bisection: halves are ordered like their bits.
  int low = 0, high = 0x7c00;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (HalfValue(static_cast<uint16_t>(middle)) <= magnitude ? low : high) = middle;
  }
  if (low == 0x7bff) return sign | 0x7bff;
  const double below = magnitude - HalfValue(static_cast<uint16_t>(low));
  const double above = HalfValue(static_cast<uint16_t>(high)) - magnitude;
  if (below != above) return static_cast<uint16_t>(sign | (below < above ? low : high));
  return static_cast<uint16_t>(sign | (low % 2 ? high : low));
}

qalora::Layer Spec::layer() const {
  qalora::Attributes attributes;
  attributes.k = k;
  attributes.n = n;
  attributes.bits = bits;
  attributes.group_size = group;
  const char* const computes[] = {"int8", "int16", "fp32"};
  attributes.compute = computes[digits - 1];
  qalora::Layer layer;
  qalora::Error error;
  if (!qalora::CheckAttributes(attributes, &layer, &error)) std::abort();
  return layer;
}

std::string Spec::text() const {
  std::string text = "bits " + std::to_string(bits) + ", group " + std::to_string(group);
  text += ", K " + std::to_string(k) + ", N " + std::to_string(n) + ", M " + std::to_string(m);
  text += ", digits " + std::to_string(digits);
  text += half_x ? ", x half" : ", x float";
  text += half_parameters ? ", parameters half" : ", parameters float";
  text += bias ? ", bias" : ", no bias";
  return text + ", " + Name(values) + ", seed " + std::to_string(seed);
}

Data MakeData(const Spec& spec) {
  Rng rng(spec.seed);
  const qalora::Layer layer = spec.layer();
  Data data;
  int exponent = 0;
  for (int64_t i = 0; i < spec.m * spec.k; ++i) {
    data.x.push_back(Rounded(DrawX(spec, i % spec.k, &rng, &exponent), spec.half_x));
  }
  // Padding of the tail group is filled too: nothing may depend on it.
  for (int64_t i = 0; i < spec.n * layer.row_bytes(); ++i) {
    data.codes.push_back(static_cast<uint8_t>(rng.Next() >> 32));
  }
  for (int64_t i = 0; i < spec.n * layer.groups; ++i) {
    data.scale.push_back(Rounded(DrawScale(spec, &rng), spec.half_parameters));
    data.zero_point.push_back(Rounded(DrawZero(spec, &rng), spec.half_parameters));
  }
  for (int64_t i = 0; spec.bias && i < spec.n; ++i) {
    data.bias.push_back(Rounded(rng.Uniform(), spec.half_x));
  }
  data.skip_row.assign(spec.m, false);
  data.skip_column.assign(spec.n, false);
  if (spec.values == Values::kNotFinite) Spoil(spec, &rng, &data);
  return data;
}

Expected Reference(const Spec& spec, const Data& data) {
  const qalora::Layer layer = spec.layer();
  const std::vector<double> x = Activations(spec, data), lost = Lost(spec, data);
  Expected expected;
  expected.y.resize(spec.m * spec.n);
  expected.tolerance.resize(spec.m * spec.n);
  std::vector<double> weight(spec.k), size(spec.k);
  for (int64_t n = 0; n < spec.n; ++n) {
    for (int64_t k = 0; k < spec.k; ++k) {
      const int64_t at = n * layer.groups + k / spec.group;
      const double code = Code(&data.codes[n * layer.row_bytes()], layer, k);
      const double scale = data.scale[at], zero = data.zero_point[at];
      weight[k] = scale * (code - zero);
      size[k] = scale * (code + std::fabs(zero));
    }
    const double bias = spec.bias ? data.bias[n] : 0.0;
    for (int64_t m = 0; m < spec.m; ++m) {
      double sum = bias, sizes = std::fabs(bias), rounded = 0.0;
      for (int64_t k = 0; k < spec.k; ++k) {
        sum += x[m * spec.k + k] * weight[k];
        sizes += std::fabs(x[m * spec.k + k]) * size[k];
        rounded += lost[m * spec.k + k] * std::fabs(weight[k]);
      }
      expected.y[m * spec.n + n] = sum;
      expected.tolerance[m * spec.n + n] = kUnits * kEpsilon * sizes + rounded + kFloor;
    }
  }
  return expected;
}

}  // namespace qalora_test
