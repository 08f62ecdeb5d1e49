// The kernels, written once over a vector type V; each level's file includes this with its own V.
//
// Everything is in an unnamed namespace on purpose: the including files are compiled for different
// instruction sets, so nothing here may be merged across them. For the same reason no function of
// the standard library is called, only intrinsics and memory functions.
//
// V provides: I (32-bit lanes of codes), F (float lanes), Acc (integer sums), kStep bytes, kTileM
// columns of the fp32 tile, kInt8M of the int8 tile; Load, LoadPartial, And, Shr<n>,
// Field<width, index>, SmallByte<index>; High, AddHigh<f>; ZeroAcc, Dot, SumAcc, DotBytes;
// ZeroF, LoadF, StoreF, Mul, Add, Sub, Negate, Fma, Reduce, LaneValues,
// BlockValues<lanes of a block>, LoadParameter, Prefetch;
// LargestBits16, Quantize16; StoreHalf.
#pragma once

#include <cstdint>
#include <cstring>

#include "bits.h"
#include "kernels.h"

namespace qalora {
namespace {

template <int value>
struct Index {
  static constexpr int k = value;
};

// Calls f(Index<0>), ..., f(Index<count - 1>): shifts and fields need constants.
template <int count, int from = 0, class Function>
inline __attribute__((always_inline)) void Unroll(Function&& f) {
  if constexpr (from < count) {
    f(Index<from>{});
    Unroll<count, from + 1>(f);
  }
}

// How far ahead memory is asked for, in bytes. DRAM pages and the hardware prefetcher both end at 4
// KiB, so codes are asked for from the page after; scales and zero-points are read at a fraction of
// the speed. Measured with the weights out of cache (benchmarks/ort_layers.py).
constexpr int64_t kCodesAhead = 6144;
constexpr int64_t kParametersAhead = 2048;

// How a step's bytes become codes. A step is a vector of kField-bit fields; byte i, field f holds
// code i * kPerByte + f of the step. 3-bit codes are 2-bit fields with a plane of high bits: see
// kUnitBytes.
template <class V, int bits>
struct Codec {
  using I = typename V::I;
  static constexpr int kField = bits == 3 ? 2 : bits;
  static constexpr int kPerByte = 8 / kField;
  static constexpr int kLaneFields = 32 / kField;
  static constexpr int kCodes = V::kStep * kPerByte;

  // What a step has loaded.
  struct Bytes {
    I low;
    typename V::High high;  // of 3 bits
  };

  // Field f of each byte, as a byte.
  template <int f>
  static inline __attribute__((always_inline)) I ByteCodes(const Bytes& v) {
    const I codes = V::And(V::template Shr<f * kField>(v.low), V::SetBytes((1 << kField) - 1));
    if constexpr (bits == 3) {
      return V::template AddHigh<f>(codes, v.high);
    } else {
      return codes;
    }
  }

  // Sums of code times activation in each lane, exact: x in the order of the planes of a step.
  static inline __attribute__((always_inline)) typename V::F Dot(const Bytes& v, const int8_t* x) {
    if constexpr (bits == 8) {
      return V::DotBytes(v.low, x);
    } else {
      typename V::Acc acc = V::ZeroAcc();
      Unroll<kPerByte>([&](auto f) {
        acc = V::Dot(acc, ByteCodes<f.k>(v), x + f.k * V::kStep);
      });
      return V::SumAcc(acc);
    }
  }

  // Calls use(Index<slot>, codes as floats) for the fields of a lane, slot by slot.
  template <class Use>
  static inline __attribute__((always_inline)) void EachField(const Bytes& v, Use&& use) {
    if constexpr (bits == 3) {
      Unroll<kPerByte>([&](auto f) {
        const I codes = ByteCodes<f.k>(v);
        Unroll<4>([&](auto byte) {
          use(Index<byte.k * kPerByte + f.k>{}, V::template SmallByte<byte.k>(codes));
        });
      });
    } else {
      Unroll<kLaneFields>([&](auto field) {
        use(field, V::template Field<kField, field.k>(v.low));
      });
    }
  }
};

// A row of codes, walked step by step.
template <class V, int bits>
struct RowReader {
  using Bytes = typename Codec<V, bits>::Bytes;
  const uint8_t* low;
  const uint8_t* high;
  int64_t bytes;  // of the low part

  RowReader(const Job& job, int64_t n) {
    low = job.codes + n * job.layer->row_bytes();
    bytes = job.layer->low_bytes();
    high = low + bytes;
  }
  // Reads no byte past the row.
  inline __attribute__((always_inline)) Bytes Step(int64_t step) const {
    const int64_t at = step * V::kStep;
    Bytes v;
    const bool full = __builtin_expect(at + V::kStep <= bytes, 1);
    v.low = full ? V::Load(low + at) : V::LoadPartial(low + at, bytes - at);
    if constexpr (bits == 3) {
      const int64_t first = at % kUnitBytes, unit = at - first;
      const int64_t left = bytes - unit;
      const int64_t size = left < kUnitBytes ? left : kUnitBytes;
      v.high = V::High::Load(high + unit / 2, size, first);
    }
    return v;
  }
  inline __attribute__((always_inline)) void Prefetch(int64_t step) const {
    V::Prefetch(low + step * V::kStep + kCodesAhead);
    if constexpr (bits == 3) V::Prefetch(high + step * V::kStep / 2 + kCodesAhead);
  }
};

// Asks for scales and zero-points, as many as row n has, kParametersAhead of it.
template <class V>
inline void PrefetchParameters(const Job& job, int64_t n) {
  const int64_t width = job.half_parameters ? 2 : 4;
  const int64_t bytes = job.layer->groups * width;
  const int64_t begin = n * bytes + kParametersAhead;
  for (int64_t at = 0; at < bytes; at += 64) {
    V::Prefetch(static_cast<const uint8_t*>(job.scale) + begin + at);
    V::Prefetch(static_cast<const uint8_t*>(job.zero_point) + begin + at);
  }
}

// Scales of groups [begin, end) of row n as floats, and scale * zero_point; zeros behind them.
template <class V>
inline void ExpandGroups(const Job& job, int64_t n, int64_t begin, int64_t end, float* scale,
                         float* product) {
  const int64_t groups = job.layer->groups;
  const int64_t base = n * groups;
  const bool half = job.half_parameters;
  if (begin == 0) PrefetchParameters<V>(job, n);
  for (int64_t g = begin; g < end; g += V::kLanes) {
    const int64_t left = end - g;
    const auto s = V::LoadParameter(job.scale, half, base + g, left);
    const auto z = V::LoadParameter(job.zero_point, half, base + g, left);
    V::StoreF(scale + g, s);
    V::StoreF(product + g, V::Mul(s, z));
  }
  for (int64_t g = end; g < end + 16; g += V::kLanes) {
    V::StoreF(scale + g, V::ZeroF());
    V::StoreF(product + g, V::ZeroF());
  }
}

// Sums of scale * zero_point * (sum of x) over the groups of a row: the subtrahend of the
// zero-points, distributed over the lanes of a vector.
template <class V>
inline typename V::F ZeroPointTerm(const Job& job, const float* product, int64_t row) {
  const float* sum = job.group_sum + row * job.plan.group_floats;
  auto acc = V::ZeroF();
  for (int64_t g = 0; g < job.layer->groups; g += V::kLanes) {
    acc = V::Fma(V::LoadF(product + g), V::LoadF(sum + g), acc);
  }
  return acc;
}

// `wide` weight rows from n against `tall` rows of x from m, int8 activations.
template <class V, int bits, int wide, int tall>
inline void Int8Tile(const Job& job, int64_t n, int64_t m, const float* const (&scale)[wide],
                     const float* const (&product)[wide]) {
  using C = Codec<V, bits>;
  const int64_t steps = job.plan.steps;
  const RowReader<V, bits> first(job, n);
  const int64_t row_bytes = job.layer->row_bytes();
  const int8_t* x = job.quantized + m * job.plan.prepared();
  const float* x_scale = job.lane_scale + m * steps * V::kLanes;
  typename V::F acc[wide][tall];
  for (auto& line : acc) {
    for (auto& value : line) value = V::ZeroF();
  }
  for (int64_t step = 0; step < steps; ++step) {
    Unroll<wide>([&](auto r) {
      RowReader<V, bits> reader = first;
      reader.low += r.k * row_bytes;
      reader.high += r.k * row_bytes;
      const auto v = reader.Step(step);
      reader.Prefetch(step);
      const auto s = V::LaneValues(scale[r.k], job.steps, step);
      Unroll<tall>([&](auto c) {
        const auto dot = C::Dot(v, x + (c.k * steps + step) * C::kCodes);
        const auto xs = V::LoadF(x_scale + (c.k * steps + step) * V::kLanes);
        acc[r.k][c.k] = V::Fma(dot, V::Mul(s, xs), acc[r.k][c.k]);
      });
    });
  }
  for (int r = 0; r < wide; ++r) {
    const float bias = job.bias ? job.bias[n + r] : 0.0f;
    for (int c = 0; c < tall; ++c) {
      const auto zero = ZeroPointTerm<V>(job, product[r], m + c);
      job.y[(m + c) * job.layer->n + n + r] = V::Reduce(V::Sub(acc[r][c], zero)) + bias;
    }
  }
}

// For one row of x, int8: scale times activation scale of each block of weight row n to `combined`,
// `groups` is room for scales. Returns what ZeroPointTerm does.
template <class V, bool half>
inline typename V::F CombineScales(const Job& job, int64_t n, float* groups, float* combined) {
  const int64_t count = job.layer->groups, base = n * count;
  const bool same = job.plan.blocks == count;
  PrefetchParameters<V>(job, n);
  auto zero = V::ZeroF();
  for (int64_t g = 0; g < count; g += V::kLanes) {
    const int64_t left = count - g;
    const auto s = V::LoadParameter(job.scale, half, base + g, left);
    const auto z = V::LoadParameter(job.zero_point, half, base + g, left);
    zero = V::Fma(V::Mul(s, z), V::LoadF(job.group_sum + g), zero);
    V::StoreF(same ? combined + g : groups + g, same ? V::Mul(s, V::LoadF(job.block_scale + g)) : s);
  }
  if (!same) {
    for (int64_t i = 0; i < 16; i += V::kLanes) V::StoreF(groups + count + i, V::ZeroF());
    for (int64_t b = 0, vector = 0; b < job.plan.blocks; b += V::kLanes, ++vector) {
      const auto s = V::LaneValues(groups, job.blocks, vector);
      V::StoreF(combined + b, V::Mul(s, V::LoadF(job.block_scale + b)));
    }
  }
  const int64_t end = job.plan.blocks;
  for (int64_t i = 0; i < 16; i += V::kLanes) V::StoreF(combined + end + i, V::ZeroF());
  return zero;
}

// Weight row n against the one row of x, int8.
template <class V, int bits, int block>
inline void Int8Row(const Job& job, int64_t n, const float* combined, typename V::F zero) {
  using C = Codec<V, bits>;
  constexpr int kLanesPerBlock = block / (4 * C::kPerByte);
  const RowReader<V, bits> reader(job, n);
  const int64_t steps = job.plan.steps;
  auto acc = V::Negate(zero);
  for (int64_t step = 0; step < steps; ++step) {
    const auto v = reader.Step(step);
    reader.Prefetch(step);
    const auto dot = C::Dot(v, job.quantized + step * C::kCodes);
    acc = V::Fma(dot, V::template BlockValues<kLanesPerBlock>(combined, step), acc);
  }
  job.y[n] = V::Reduce(acc) + (job.bias ? job.bias[n] : 0.0f);
}

// All weight rows against the one row of x, int8. The scales of a row are combined one row ahead:
// their loads are in flight, and their stores done, when the loop over codes needs them.
template <class V, int bits, int block, bool half>
void Int8Rows(const Job& job, int64_t begin, int64_t end, float* scratch) {
  float* groups = scratch;
  float* buffers[2] = {groups + job.plan.group_floats,
                       groups + job.plan.group_floats + job.plan.block_floats};
  auto zero = CombineScales<V, half>(job, begin, groups, buffers[0]);
  for (int64_t n = begin; n < end; ++n) {
    auto next = zero;
    if (n + 1 < end) next = CombineScales<V, half>(job, n + 1, groups, buffers[(n - begin + 1) % 2]);
    Int8Row<V, bits, block>(job, n, buffers[(n - begin) % 2], zero);
    zero = next;
  }
}

// One weight row against `tall` rows of x, float activations, straight from the codes.
template <class V, int bits, int tall>
inline void Fp32Row(const Job& job, int64_t n, const float* scale, const float* product) {
  using C = Codec<V, bits>;
  const int64_t steps = job.plan.steps;
  const RowReader<V, bits> reader(job, n);
  typename V::F acc[tall];
  for (auto& value : acc) value = V::ZeroF();
  for (int64_t step = 0; step < steps; ++step) {
    const auto v = reader.Step(step);
    reader.Prefetch(step);
    const auto s = V::LaneValues(scale, job.steps, step);
    // Two sums each, so that the chain of additions is half as long.
    typename V::F even[tall], odd[tall];
    for (int c = 0; c < tall; ++c) even[c] = odd[c] = V::ZeroF();
    const float* x = job.permuted + step * C::kCodes;
    C::EachField(v, [&](auto slot, typename V::F code) {
      Unroll<tall>([&](auto c) {
        auto& sum = slot.k % 2 ? odd[c.k] : even[c.k];
        sum = V::Fma(code, V::LoadF(x + c.k * job.plan.prepared() + slot.k * V::kLanes), sum);
      });
    });
    for (int c = 0; c < tall; ++c) acc[c] = V::Fma(V::Add(even[c], odd[c]), s, acc[c]);
  }
  const float bias = job.bias ? job.bias[n] : 0.0f;
  for (int c = 0; c < tall; ++c) {
    const auto zero = ZeroPointTerm<V>(job, product, c);
    job.y[c * job.layer->n + n] = V::Reduce(V::Sub(acc[c], zero)) + bias;
  }
}

// Calls row(n, scale, product) for each weight row, with the groups of the row after it already
// expanded: their loads are in flight, and their stores done, when the loop over codes needs them.
template <class V, class Row>
inline void EachRow(const Job& job, int64_t begin, int64_t end, float* scratch, Row&& row) {
  const int64_t size = job.plan.group_floats, groups = job.layer->groups;
  float* buffers[2] = {scratch, scratch + 2 * size};
  ExpandGroups<V>(job, begin, 0, groups, buffers[0], buffers[0] + size);
  for (int64_t n = begin; n < end; ++n) {
    float* current = buffers[(n - begin) % 2];
    float* next = buffers[(n - begin + 1) % 2];
    if (n + 1 < end) ExpandGroups<V>(job, n + 1, 0, groups, next, next + size);
    row(n, current, current + size);
  }
}

// Few rows of x: each weight byte is read once, all rows of x against it.
template <class V, int bits, int tall>
void RunFew(const Job& job, int64_t begin, int64_t end, float* scratch) {
  EachRow<V>(job, begin, end, scratch, [&](int64_t n, const float* scale, const float* product) {
    if (tall > 1 && job.layer->int8) {
      const float* const scales[1] = {scale};
      const float* const products[1] = {product};
      Int8Tile<V, bits, 1, tall>(job, n, 0, scales, products);
    } else {
      Fp32Row<V, bits, tall>(job, n, scale, product);
    }
  });
}

// Rows of x that are multiplied by a tile of weights at a time: so many stay in the L2 cache.
constexpr int64_t kBlockRows = 48;

// Rows [m, stop) of x times `wide` weight rows from n.
template <class V, int bits, int wide>
inline void Int8Columns(const Job& job, int64_t n, int64_t m, int64_t stop, float* scratch) {
  const int64_t size = job.plan.group_floats, groups = job.layer->groups;
  const float* scale[wide];
  const float* product[wide];
  for (int r = 0; r < wide; ++r) {
    float* buffer = scratch + 2 * r * size;
    ExpandGroups<V>(job, n + r, 0, groups, buffer, buffer + size);
    scale[r] = buffer;
    product[r] = buffer + size;
  }
  for (; m + V::kInt8M <= stop; m += V::kInt8M) {
    Int8Tile<V, bits, wide, V::kInt8M>(job, n, m, scale, product);
  }
  for (; m < stop; ++m) Int8Tile<V, bits, wide, 1>(job, n, m, scale, product);
}

// Many rows of x, int8: tiles of four weight rows.
template <class V, int bits>
void Int8Many(const Job& job, int64_t begin, int64_t end, float* scratch) {
  for (int64_t m = 0; m < job.rows; m += kBlockRows) {
    const int64_t stop = m + kBlockRows < job.rows ? m + kBlockRows : job.rows;
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) Int8Columns<V, bits, 4>(job, n, m, stop, scratch);
    for (; n < end; ++n) Int8Columns<V, bits, 1>(job, n, m, stop, scratch);
  }
}

// Steps [begin, end) of weight row n as floats, in the order of the prepared activations.
template <class V, int bits>
inline void Dequantize(const Job& job, int64_t n, int64_t begin, int64_t end, const float* scale,
                       const float* product, float* out) {
  using C = Codec<V, bits>;
  const RowReader<V, bits> reader(job, n);
  for (int64_t step = begin; step < end; ++step) {
    const auto v = reader.Step(step);
    reader.Prefetch(step);
    const auto s = V::LaneValues(scale, job.steps, step);
    const auto offset = V::Negate(V::LaneValues(product, job.steps, step));
    C::EachField(v, [&](auto slot, typename V::F code) {
      V::StoreF(out + slot.k * V::kLanes, V::Fma(code, s, offset));
    });
    out += C::kCodes;
  }
}

// y[m .. m + tall, n .. n + used] += four dequantized rows times `tall` rows of x, `length` long.
template <class V, int tall>
inline void Fp32Tile(const Job& job, const float* weight, const float* x, int64_t length, int64_t n,
                     int64_t used, int64_t m, bool first) {
  typename V::F acc[4][tall];
  for (auto& line : acc) {
    for (auto& value : line) value = V::ZeroF();
  }
  const int64_t pitch = job.plan.prepared();
  for (int64_t k = 0; k < length; k += V::kLanes) {
    typename V::F w[4];
    for (int r = 0; r < 4; ++r) w[r] = V::LoadF(weight + r * length + k);
    Unroll<tall>([&](auto c) {
      const auto value = V::LoadF(x + c.k * pitch + k);
      for (int r = 0; r < 4; ++r) acc[r][c.k] = V::Fma(w[r], value, acc[r][c.k]);
    });
  }
  for (int64_t r = 0; r < used; ++r) {
    for (int64_t c = 0; c < tall; ++c) {
      float* y = job.y + (m + c) * job.layer->n + n + r;
      const float before = first ? (job.bias ? job.bias[n + r] : 0.0f) : *y;
      *y = before + V::Reduce(acc[r][c]);
    }
  }
}

// Rows [m, stop) of x times the four dequantized rows in `weight`.
template <class V>
inline void Fp32Rows(const Job& job, const float* weight, const float* x, int64_t length, int64_t n,
                     int64_t used, int64_t m, int64_t stop, bool first) {
  const int64_t pitch = job.plan.prepared();
  for (; m + V::kTileM <= stop; m += V::kTileM) {
    Fp32Tile<V, V::kTileM>(job, weight, x + m * pitch, length, n, used, m, first);
  }
  for (; m < stop; ++m) Fp32Tile<V, 1>(job, weight, x + m * pitch, length, n, used, m, first);
}

// Many rows of x, fp32: dequantize four rows by kTileCodes at a time, then a register-blocked product.
template <class V, int bits>
void Fp32Many(const Job& job, int64_t begin, int64_t end, float* scratch) {
  using C = Codec<V, bits>;
  constexpr int64_t kBlock = kTileCodes / C::kCodes;
  static_assert(kBlock >= 1 && kTileCodes % C::kCodes == 0, "a tile is a multiple of steps");
  const int64_t size = job.plan.group_floats, group = job.layer->group_size;
  float* weight = scratch + 8 * size;
  for (int64_t step = 0; step < job.plan.steps; step += kBlock) {
    const int64_t stop = step + kBlock < job.plan.steps ? step + kBlock : job.plan.steps;
    const int64_t length = (stop - step) * C::kCodes;
    const int64_t low = job.steps.first[step];
    int64_t high = (stop * C::kCodes + group - 1) / group;
    if (high > job.layer->groups) high = job.layer->groups;
    const float* x = job.permuted + step * C::kCodes;
    for (int64_t m = 0; m < job.rows; m += kBlockRows) {
      const int64_t last = m + kBlockRows < job.rows ? m + kBlockRows : job.rows;
      for (int64_t n = begin; n < end; n += 4) {
        const int64_t used = end - n < 4 ? end - n : 4;
        for (int64_t r = 0; r < used; ++r) {
          ExpandGroups<V>(job, n + r, low, high, scratch, scratch + size);
          Dequantize<V, bits>(job, n + r, step, stop, scratch, scratch + size, weight + r * length);
        }
        // Rows that are not there: any finite weights, their sums are not stored.
        if (used < 4) std::memset(weight + used * length, 0, (4 - used) * length * sizeof(float));
        Fp32Rows<V>(job, weight, x, length, n, used, m, last, !step);
      }
    }
  }
}

template <class V, int bits>
void RunBits(const Job& job, int64_t begin, int64_t end, float* scratch) {
  if (job.rows == 1 && job.layer->int8) {
    const bool half = job.half_parameters;
    if (job.layer->block() == 32) {
      return half ? Int8Rows<V, bits, 32, true>(job, begin, end, scratch)
                  : Int8Rows<V, bits, 32, false>(job, begin, end, scratch);
    }
    return half ? Int8Rows<V, bits, 16, true>(job, begin, end, scratch)
                : Int8Rows<V, bits, 16, false>(job, begin, end, scratch);
  }
  switch (job.rows) {
    case 1: return RunFew<V, bits, 1>(job, begin, end, scratch);
    case 2: return RunFew<V, bits, 2>(job, begin, end, scratch);
    case 3: return RunFew<V, bits, 3>(job, begin, end, scratch);
    case 4: return RunFew<V, bits, 4>(job, begin, end, scratch);
    default: break;
  }
  job.layer->int8 ? Int8Many<V, bits>(job, begin, end, scratch)
                  : Fp32Many<V, bits>(job, begin, end, scratch);
}

template <class V>
void Run(const Job& job, int64_t begin, int64_t end, float* scratch) {
  switch (job.layer->bits) {
    case 2: return RunBits<V, 2>(job, begin, end, scratch);
    case 3: return RunBits<V, 3>(job, begin, end, scratch);
    case 4: return RunBits<V, 4>(job, begin, end, scratch);
    default: return RunBits<V, 8>(job, begin, end, scratch);
  }
}

}  // namespace
}  // namespace qalora
