// Few rows of x against weight rows, straight from the codes; written once over a vector type V as
// codec_template.h is.
#pragma once

#include "codec_template.h"

namespace qalora {
namespace {

// `wide` weight rows from n against `tall` rows of x from m.
template <class V, int bits, int digits, int wide, int tall>
QALORA_ONCE void FewTile(const Job& job, int64_t n, int64_t m, const float* scale) {
  using C = Codec<V, bits>;
  const int64_t steps = job.plan.steps, pitch = job.plan.pitch(), size = job.plan.group_floats;
  const RowReader<V, bits> first(job, n);
  const int64_t row_bytes = job.layer->row_bytes();
  const int8_t* x = job.quantized + m * pitch;
  const float* x_scale = job.lane_scale + m * steps * V::kLanes;
  typename V::F acc[wide][tall];
  for (auto& line : acc) {
    for (auto& value : line) value = V::ZeroF();
  }
  for (int64_t step = 0; step < steps; ++step) {
    typename C::Planes codes[wide];
    typename V::F s[wide];
    Unroll<wide>([&](auto w) {
      RowReader<V, bits> reader = first;
      reader.low += w.k * row_bytes;
      reader.high += w.k * row_bytes;
      codes[w.k] = C::Unpack(reader.Step(step));
      reader.Prefetch(step);
      s[w.k] = V::LaneValues(scale + w.k * 2 * size, job.steps, step);
    });
    typename V::Sum dot[wide][tall];
    C::template Dot<digits, wide, tall>(codes, x + step * digits * C::kCodes, pitch, dot);
    Unroll<tall>([&](auto c) {
      const auto xs = V::LoadF(x_scale + (c.k * steps + step) * V::kLanes);
      Unroll<wide>([&](auto w) {
        acc[w.k][c.k] = V::Fma(V::ToFloat(dot[w.k][c.k]), V::Mul(s[w.k], xs), acc[w.k][c.k]);
      });
    });
  }
  for (int w = 0; w < wide; ++w) {
    const float bias = job.bias ? job.bias[n + w] : 0.0f;
    for (int c = 0; c < tall; ++c) {
      const auto zero = ZeroPointTerm<V>(job, scale + (2 * w + 1) * size, m + c);
      job.y[(m + c) * job.layer->n + n + w] = V::Reduce(V::Sub(acc[w][c], zero)) + bias;
    }
  }
}

// Two to seven rows of x. A weight row that is left over takes one row of x at a time.
template <class V, int bits, int digits>
QALORA_ONCE void FewRows(const Job& job, int64_t begin, int64_t end, float* scratch) {
  const int64_t size = job.plan.group_floats;
  const auto expand = [&](int64_t n, float* to) {
    ExpandGroups<V>(job, n, to, to + size);
  };
  int64_t n = begin;
  for (; n + V::kWide <= end; n += V::kWide) {
    for (int w = 0; w < V::kWide; ++w) expand(n + w, scratch + w * 2 * size);
    int64_t m = 0;
    for (; m + 4 <= job.rows; m += 4) FewTile<V, bits, digits, V::kWide, 4>(job, n, m, scratch);
    for (; m + 2 <= job.rows; m += 2) FewTile<V, bits, digits, V::kWide, 2>(job, n, m, scratch);
    if (m < job.rows) FewTile<V, bits, digits, V::kWide, 1>(job, n, m, scratch);
  }
  for (; n < end; ++n) {
    expand(n, scratch);
    for (int64_t m = 0; m < job.rows; ++m) FewTile<V, bits, digits, 1, 1>(job, n, m, scratch);
  }
}

// For one row of x: scale times activation scale of each block of weight row n to `combined`,
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

// Weight row n against the one row of x.
template <class V, int bits, int digits, int block>
inline __attribute__((always_inline)) void OneTile(const Job& job, int64_t n,
                                                   const float* combined, typename V::F zero) {
  using C = Codec<V, bits>;
  constexpr int kLanesPerBlock = block / (4 * C::kPerByte);
  const RowReader<V, bits> reader(job, n);
  const int64_t steps = job.plan.steps;
  auto acc = V::Negate(zero);
  for (int64_t step = 0; step < steps; ++step) {
    const typename C::Planes codes[1] = {C::Unpack(reader.Step(step))};
    reader.Prefetch(step);
    typename V::Sum dot[1][1];
    C::template Dot<digits, 1, 1>(codes, job.quantized + step * digits * C::kCodes, 0, dot);
    const auto scale = V::template BlockValues<kLanesPerBlock>(combined, step);
    acc = V::Fma(V::ToFloat(dot[0][0]), scale, acc);
  }
  job.y[n] = V::Reduce(acc) + (job.bias ? job.bias[n] : 0.0f);
}

// One row of x. The scales of a weight row are combined one row ahead.
template <class V, int bits, int digits, int block, bool half>
QALORA_ONCE void OneRow(const Job& job, int64_t begin, int64_t end, float* scratch) {
  float* groups = scratch;
  float* buffers[2] = {groups + job.plan.group_floats,
                       groups + job.plan.group_floats + job.plan.block_floats};
  auto zero = CombineScales<V, half>(job, begin, groups, buffers[0]);
  for (int64_t n = begin; n < end; ++n) {
    auto next = zero;
    if (n + 1 < end) next = CombineScales<V, half>(job, n + 1, groups, buffers[(n - begin + 1) % 2]);
    OneTile<V, bits, digits, block>(job, n, buffers[(n - begin) % 2], zero);
    zero = next;
  }
}

template <class V, int bits, int digits>
void RunFew(const Job& job, int64_t begin, int64_t end, float* scratch) {
  if (job.rows > 1) return FewRows<V, bits, digits>(job, begin, end, scratch);
  const bool half = job.half_parameters;
  if (job.layer->block() == 32) {
    return half ? OneRow<V, bits, digits, 32, true>(job, begin, end, scratch)
                : OneRow<V, bits, digits, 32, false>(job, begin, end, scratch);
  }
  return half ? OneRow<V, bits, digits, 16, true>(job, begin, end, scratch)
              : OneRow<V, bits, digits, 16, false>(job, begin, end, scratch);
}

}  // namespace
}  // namespace qalora
