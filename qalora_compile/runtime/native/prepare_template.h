// Preparing activations, written once over a vector type V as the kernels are.
//
// fp32: x in the order of a step's fields, and its sum in each group. int8: x quantized per block,
// then in the order of a step's planes, with one scale per lane; the sums are those of the quantized
// values, so that all of the layer uses the same x.
#pragma once

#include "half.h"
#include "kernel_template.h"

namespace qalora {
namespace {

// Blocks whose largest magnitude is below this count as zero: 127 / magnitude must stay finite.
constexpr uint32_t kTinyBits = 27u << 23;  // 2^-100
constexpr uint32_t kInfinityBits = 0x7f800000u;

inline float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Quantize `count` values (16 or 32, zero-padded by the caller) to `out`; returns the sum of the
// codes and the scale. A block with an infinity or a NaN gets a NaN scale.
template <class V>
inline int32_t QuantizeBlock(const float* x, int64_t count, int8_t* out, float* scale) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const uint32_t bits = V::LargestBits16(x + i);
    if (bits > largest) largest = bits;
  }
  *scale = 0.0f;
  if (largest < kTinyBits || largest >= kInfinityBits) {
    if (largest >= kInfinityBits) *scale = FromBits(0x7fc00000u);
    std::memset(out, 0, count);
    return 0;
  }
  const float magnitude = FromBits(largest);
  *scale = magnitude / 127.0f;
  const float inverse = 127.0f / magnitude;
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i += 16) sum += V::Quantize16(x + i, inverse, out + i);
  return sum;
}

// Quantize a row of K values to `codes`, [prepared], and fill the block scales and the group sums.
template <class V>
inline void QuantizeRow(const Job& job, int64_t row, int8_t* codes) {
  const Layer& layer = *job.layer;
  const float* x = job.x + row * layer.k;
  float* sum = job.group_sum + row * job.plan.group_floats;
  float* block_scale = job.block_scale + row * job.plan.block_floats;
  const int64_t block = layer.block();
  std::memset(sum, 0, job.plan.group_floats * sizeof(float));
  std::memset(block_scale, 0, job.plan.block_floats * sizeof(float));
  std::memset(codes, 0, job.plan.prepared());
  for (int64_t k = 0; k < layer.k; k += block) {
    float padded[32] = {};
    const float* from = x + k;
    if (k + block > layer.k) {
      std::memcpy(padded, from, (layer.k - k) * sizeof(float));
      from = padded;
    }
    float* scale = block_scale + k / block;
    const int32_t total = QuantizeBlock<V>(from, block, codes + k, scale);
    sum[k / layer.group_size] += static_cast<float>(total) * *scale;
  }
}

// Repeat each block's scale for each lane of the block, zeros behind the row.
template <class V, int bits>
inline void SpreadBlocks(const Job& job, int64_t row) {
  const int64_t lanes = job.plan.steps * V::kLanes;
  const int64_t per_block = job.layer->block() / (4 * Codec<V, bits>::kPerByte);
  const float* from = job.block_scale + row * job.plan.block_floats;
  float* to = job.lane_scale + row * lanes;
  const int64_t used = job.plan.blocks * per_block;
  for (int64_t i = 0; i < used; ++i) to[i] = from[i / per_block];
  for (int64_t i = used; i < lanes; ++i) to[i] = 0.0f;
}

template <class V, int bits>
inline void PrepareInt8(const Job& job, int64_t row, float* scratch) {
  using C = Codec<V, bits>;
  int8_t* codes = reinterpret_cast<int8_t*>(scratch);
  QuantizeRow<V>(job, row, codes);
  if (job.lane_scale) SpreadBlocks<V, bits>(job, row);
  int8_t* out = job.quantized + row * job.plan.prepared();
  for (int64_t step = 0; step < job.plan.steps; ++step) {
    for (int field = 0; field < C::kPerByte; ++field) {
      const int8_t* from = codes + step * C::kCodes + field;
      for (int i = 0; i < V::kStep; ++i) out[i] = from[i * C::kPerByte];
      out += V::kStep;
    }
  }
}

// Sums of x in each group; sixteen partial sums let the compiler use vectors.
inline void SumGroups(const Job& job, const float* x, float* sum) {
  const Layer& layer = *job.layer;
  std::memset(sum, 0, job.plan.group_floats * sizeof(float));
  for (int64_t g = 0; g < layer.groups; ++g) {
    const int64_t begin = g * layer.group_size;
    const int64_t count = layer.k - begin < layer.group_size ? layer.k - begin : layer.group_size;
    float part[16] = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      for (int j = 0; j < 16; ++j) part[j] += x[begin + i + j];
    }
    for (int j = 0; i + j < count; ++j) part[j] += x[begin + i + j];
    for (int width = 8; width; width /= 2) {
      for (int j = 0; j < width; ++j) part[j] += part[j + width];
    }
    sum[g] = part[0];
  }
}

template <class V, int bits>
inline void PrepareFp32(const Job& job, int64_t row) {
  using C = Codec<V, bits>;
  const float* x = job.x + row * job.layer->k;
  float* out = job.permuted + row * job.plan.prepared();
  SumGroups(job, x, job.group_sum + row * job.plan.group_floats);
  for (int64_t step = 0; step < job.plan.steps; ++step) {
    const int64_t base = step * C::kCodes;
    const int64_t left = job.layer->k - base;
    float padded[C::kCodes];
    const float* from = x + base;
    if (left < C::kCodes) {
      std::memset(padded, 0, sizeof padded);
      if (left > 0) std::memcpy(padded, from, left * sizeof(float));
      from = padded;
    }
    for (int field = 0; field < C::kLaneFields; ++field) {
      for (int lane = 0; lane < V::kLanes; ++lane) {
        *out++ = from[lane * C::kLaneFields + field];
      }
    }
  }
}

template <class V, int bits>
inline void PrepareBits(const Job& job, int64_t row, float* scratch) {
  if (job.layer->int8) {
    PrepareInt8<V, bits>(job, row, scratch);
  } else {
    PrepareFp32<V, bits>(job, row);
  }
}

template <class V>
void Prepare(const Job& job, int64_t row, float* scratch) {
  switch (job.layer->bits) {
    case 2: return PrepareBits<V, 2>(job, row, scratch);
    case 3: return PrepareBits<V, 3>(job, row, scratch);
    case 4: return PrepareBits<V, 4>(job, row, scratch);
    default: return PrepareBits<V, 8>(job, row, scratch);
  }
}

template <class V>
void Widen(const uint16_t* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) {
    V::StoreF(to + i, V::LoadParameter(from, true, i, V::kLanes));
  }
  for (; i < count; ++i) to[i] = HalfToFloat(from[i]);
}

template <class V>
void Narrow(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) V::StoreHalf(to + i, V::LoadF(from + i));
  for (; i < count; ++i) to[i] = FloatToHalf(from[i]);
}

template <class V>
constexpr KernelSet MakeKernels(const char* name) {
  return {name, V::kStep, V::kLanes, Prepare<V>, Run<V>, Widen<V>, Narrow<V>};
}

}  // namespace
}  // namespace qalora
