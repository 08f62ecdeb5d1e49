// Splitting activations into digits, written once over a vector type V as the kernels are.
//
// x is rounded per block to multiples of a scale, the integers are split into digits, and these are
// stored in the order in which the kernels' codes fall out of their vectors.
#pragma once

#include "half.h"
#include "codec_template.h"
#include "panel_layout.h"

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

// The largest magnitude of digits put together: the first one is at most 127, and carries from the
// others do not raise it.
template <int digits>
constexpr float kLargest = 127.0f * (1 << 7 * (digits - 1));

// Round `count` values (16 or 32, zero-padded by the caller) to multiples of a scale; returns the sum
// of the integers. A block with an infinity or a NaN gets a NaN scale.
template <class V, int digits>
inline int32_t RoundBlock(const float* x, int64_t count, int32_t* out, float* scale) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const uint32_t bits = V::LargestBits16(x + i);
    if (bits > largest) largest = bits;
  }
  *scale = 0.0f;
  if (largest < kTinyBits || largest >= kInfinityBits) {
    if (largest >= kInfinityBits) *scale = FromBits(0x7fc00000u);
    std::memset(out, 0, count * sizeof(int32_t));
    return 0;
  }
  const float magnitude = FromBits(largest);
  *scale = magnitude / kLargest<digits>;
  const float inverse = kLargest<digits> / magnitude;
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i += 16) sum += V::Round16(x + i, inverse, out + i);
  return sum;
}

// Round a row of K values to `codes`, [prepared], and fill the block scales, and the sums of the rounded
// values: of blocks for few rows, of groups for panels.
template <class V, int digits>
inline void RoundRow(const Job& job, int64_t row, int32_t* codes) {
  const Layer& layer = *job.layer;
  const float* x = job.x + row * layer.k;
  float* block_sum = job.block_sum + row * job.plan.block_floats;
  float* group_sum = job.group_sum + row * job.plan.group_floats;
  float* block_scale = job.block_scale + row * job.plan.block_floats;
  const int64_t block = layer.block();
  const bool few = job.few();
  if (!few) std::memset(group_sum, 0, job.plan.group_floats * sizeof(float));
  std::memset(block_scale, 0, job.plan.block_floats * sizeof(float));
  std::memset(codes + layer.k, 0, (job.plan.prepared() - layer.k) * sizeof(int32_t));
  if (few) std::memset(block_sum, 0, job.plan.block_floats * sizeof(float));
  int64_t group = 0, left = layer.group_size;
  for (int64_t k = 0, b = 0; k < layer.k; k += block, ++b) {
    float padded[32] = {};
    const float* from = x + k;
    if (k + block > layer.k) {
      std::memcpy(padded, from, (layer.k - k) * sizeof(float));
      from = padded;
    }
    const int32_t total = RoundBlock<V, digits>(from, block, codes + k, block_scale + b);
    if (few) {
      block_sum[b] = -static_cast<float>(total);
      continue;
    }
    group_sum[group] += static_cast<float>(total) * block_scale[b];
    left -= block;
    if (!left) {
      ++group;
      left = layer.group_size;
    }
  }
}

// Codes of one byte together -> those of each plane together, in runs of `run` bytes.
template <int run, int per_byte, class T>
inline void OrderPlanes(const T* __restrict from, T* __restrict to) {
  for (int field = 0; field < per_byte; ++field) {
    for (int i = 0; i < run; ++i) to[field * run + i] = from[i * per_byte + field];
  }
}

// The signed digits of `count` integers, the last digit in -64 to 63, the first one first.
template <int digits>
inline void SplitDigits(const int32_t* __restrict codes, int64_t count, int8_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    int32_t code = codes[i];
    for (int d = digits - 1; d > 0; --d) {
      const int32_t low = ((code + 64) & 127) - 64;
      out[d * count + i] = static_cast<int8_t>(low);
      code = (code - low) >> 7;
    }
    out[i] = static_cast<int8_t>(code);
  }
}

// For few rows: the planes of each step.
template <class V, int bits, int digits>
inline void OrderSteps(const Job& job, const int32_t* codes, int8_t* out) {
  using C = Codec<V, bits>;
  int8_t split[digits * C::kCodes];
  for (int64_t step = 0; step < job.plan.steps; ++step) {
    SplitDigits<digits>(codes + step * C::kCodes, C::kCodes, split);
    for (int d = 0; d < digits; ++d) {
      OrderPlanes<V::kStep, C::kPerByte>(split + d * C::kCodes, out);
      out += C::kCodes;
    }
  }
}

// For panels: the planes of each lane, block by block.
template <class V, int bits, int digits>
inline void OrderBlocks(const Job& job, int64_t row, const int32_t* codes) {
  using C = Codec<V, bits>;
  const int64_t block = job.layer->block(), unit = PanelLayout<V>::Unit(block);
  const RowTile tile = TileOfRow<V>(job, row);
  int8_t* out = job.quantized + tile.first * job.plan.pitch() + (row - tile.first) * unit;
  int32_t ordered[32];
  for (int64_t b = 0; b < job.plan.blocks; ++b) {
    for (int64_t lane = 0; lane < block; lane += C::kLaneFields) {
      OrderPlanes<4, C::kPerByte>(codes + b * block + lane, ordered + lane);
    }
    if constexpr (PanelLayout<V>::kRows == 1) {
      SplitDigits<digits>(ordered, block, out + b * digits * block);
    } else {
      int8_t split[digits * 32];
      SplitDigits<digits>(ordered, block, split);
      int8_t* to = out + b * digits * block * tile.rows;
      for (int64_t at = 0; at < digits * block; at += unit) {
        std::memcpy(to + at * tile.rows, split + at, unit);
      }
    }
  }
}

template <class V, int bits, int digits>
inline void PrepareDigits(const Job& job, int64_t row, float* scratch) {
  int32_t* codes = reinterpret_cast<int32_t*>(scratch);
  RoundRow<V, digits>(job, row, codes);
  if (!job.few()) return OrderBlocks<V, bits, digits>(job, row, codes);
  OrderSteps<V, bits, digits>(job, codes, job.quantized + row * job.plan.pitch());
}

template <class V, int bits>
inline void PrepareBits(const Job& job, int64_t row, float* scratch) {
  switch (job.plan.digits) {
    case 1: return PrepareDigits<V, bits, 1>(job, row, scratch);
    case 2: return PrepareDigits<V, bits, 2>(job, row, scratch);
    default: return PrepareDigits<V, bits, 3>(job, row, scratch);
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

}  // namespace
}  // namespace qalora
