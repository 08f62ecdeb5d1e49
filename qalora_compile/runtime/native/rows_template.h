// Few rows of x against weight rows, straight from the codes; written once over a vector type V as
// codec_template.h is.
//
// Four weight rows go together, so that they share the loads of x and one addition across lanes. An
// element of y is the same sum in the same order wherever it is computed.
#pragma once

#include "codec_template.h"

namespace qalora {
namespace {

constexpr int kQuad = 4;
// Weight rows that all rows of x take, one after the other, before the next ones: codes stay in the
// L1 cache.
constexpr int64_t kRunRows = 8;

// What the loop over weight rows needs of a job and a row of x. A copy, because the compiler has
// to assume that what is written to y changes the job.
template <class V>
struct FewJob {
  const uint8_t* codes;
  const uint8_t* scale;
  const uint8_t* zero_point;
  int64_t row_bytes, low_bytes, groups;
  bool half;    // scales and zero-points are float16
  bool spread;  // a group is more than one block
  LaneMap blocks;
  const int32_t* step_blocks;
  int64_t steps, block_lanes, inside_rows;
  const int8_t* x;
  const float* block_scale;
  const float* block_sum;

  FewJob(const Job& job, int64_t m)
      : codes(job.codes),
        scale(static_cast<const uint8_t*>(job.scale)),
        zero_point(static_cast<const uint8_t*>(job.zero_point)),
        row_bytes(job.layer->row_bytes()),
        low_bytes(job.layer->low_bytes()),
        groups(job.layer->groups),
        half(job.half_parameters),
        spread(job.layer->group_size > job.layer->block()),
        blocks(job.blocks),
        step_blocks(job.step_blocks),
        steps(job.plan.steps),
        block_lanes(job.plan.block_lanes),
        inside_rows(job.plan.inside_rows),
        x(job.quantized + m * job.plan.pitch()),
        block_scale(job.block_scale + m * job.plan.block_floats),
        block_sum(job.block_sum + m * job.plan.block_floats) {}
};

// `wide` weight rows, the last one again for those past the end. `inside` says that all are there, and
// that reading a vector past the end of a row stays inside the tensors.
template <class V, int bits, int wide, bool inside>
struct Rows {
  RowReader<V, bits> codes[wide];
  int64_t parameters[wide];  // of scales before theirs

  inline QALORA_INLINE Rows(const FewJob<V>& job, int64_t n, int64_t last) {
    Unroll<wide>([&](auto w) QALORA_INLINE {
      const int64_t row = inside || n + w.k < last ? n + w.k : last;
      codes[w.k] = RowReader<V, bits>(job.codes + row * job.row_bytes, job.low_bytes);
      parameters[w.k] = row * job.groups;
    });
  }
  // Asks for part `part` of as many rows as these: of `steps * wide` parts, each the size of a step.
  // Rows lie one after the other, and memory is fast where it is asked for in its order.
  inline QALORA_INLINE void Prefetch(int64_t part) const {
    const uint8_t* first = codes[0].low + kCodesAhead + part * V::kStep;
    V::Prefetch(first);
    if constexpr (bits == 3) {
      V::Prefetch(first + wide * codes[0].bytes - part * V::kStep / 2);
    }
  }
};

// For vector `vector` of blocks: the scales of the weights times those of x, and the zero-points'
// terms added to `acc`.
template <class V, int bits, int wide, bool inside>
inline QALORA_INLINE void CombineScales(
    const FewJob<V>& job, const Rows<V, bits, wide, inside>& rows, bool half, int64_t vector,
    typename V::F (&scale)[wide], typename V::F (&acc)[wide]) {
  const int64_t first = job.blocks.first[vector], left = job.groups - first;
  const int64_t count = inside ? V::kLanes : left, at = vector * V::kLanes;
  const int64_t width = half ? 2 : 4;
  // Lanes that a row leaves over have its last group's values, and blocks of x that are zero.
  const bool permute = job.spread || left < V::kLanes;
  typename V::F z[wide];
  Unroll<wide>([&](auto w) QALORA_INLINE {
    const int64_t group = rows.parameters[w.k] + first;
    scale[w.k] = V::LoadParameter(job.scale, half, group, count);
    z[w.k] = V::LoadParameter(job.zero_point, half, group, count);
  });
  // The same share of what as many rows have behind these.
  const int64_t bytes = V::kLanes * width * wide;
  const int64_t ahead = rows.parameters[0] * width + vector * bytes + kParametersAhead;
  for (int64_t i = 0; i < bytes; i += 64) {
    V::Prefetch(job.scale + ahead + i);
    V::Prefetch(job.zero_point + ahead + i);
  }
  if (permute) {
    const auto lanes = V::LoadLanes(job.blocks.lane + at);
    Unroll<wide>([&](auto w) QALORA_INLINE {
      scale[w.k] = V::Permute(scale[w.k], lanes);
      z[w.k] = V::Permute(z[w.k], lanes);
    });
  }
  const auto x_scale = V::LoadF(job.block_scale + at), x_sum = V::LoadF(job.block_sum + at);
  Unroll<wide>([&](auto w) QALORA_INLINE {
    scale[w.k] = V::Mul(scale[w.k], x_scale);
    acc[w.k] = V::Fma(V::Mul(scale[w.k], z[w.k]), x_sum, acc[w.k]);
  });
}

// `wide` weight rows against a row of x: `sum` are products in each lane, to be added up.
template <class V, int bits, int digits, int wide, bool inside>
inline QALORA_INLINE void FewTile(const FewJob<V>& job, const Rows<V, bits, wide, inside>& rows,
                                  bool half, typename V::F* sum) {
  using C = Codec<V, bits>;
  typename V::F acc[wide];
  for (auto& value : acc) value = V::ZeroF();
  for (int64_t step = 0, vector = 0; step < job.steps; ++vector) {
    typename V::F scale[wide];
    CombineScales<V, bits, wide>(job, rows, half, vector, scale, acc);
    const int64_t left = job.steps - step;
    const int64_t end = step + (left < job.block_lanes ? left : job.block_lanes);
    for (const int32_t* lane = job.step_blocks; step < end; ++step, lane += V::kLanes) {
      typename C::Planes codes[wide];
      Unroll<wide>([&](auto w) QALORA_INLINE {
        codes[w.k] = C::Unpack(rows.codes[w.k].Step(step, inside));
        if constexpr (w.k * V::kStep % 64 == 0) rows.Prefetch(step * wide + w.k);
      });
      typename V::Sum dot[wide][1];
      C::template Dot<digits, wide, 1>(codes, job.x + step * digits * C::kCodes, 0, dot);
      const auto lanes = V::LoadLanes(lane);
      Unroll<wide>([&](auto w) QALORA_INLINE {
        acc[w.k] = V::Fma(V::ToFloat(dot[w.k][0]), V::Permute(scale[w.k], lanes), acc[w.k]);
      });
    }
  }
  Unroll<wide>([&](auto w) QALORA_INLINE { sum[w.k] = acc[w.k]; });
}

// Up to four weight rows from n, the last one before `end`, against row m of x.
template <class V, int bits, int digits, bool inside>
inline QALORA_INLINE void FewQuad(const Job& job, const FewJob<V>& few, bool half, int64_t n,
                                  int64_t end, int64_t m) {
  constexpr int wide = V::kWide;
  typename V::F sum[kQuad];
  Unroll<kQuad / wide>([&](auto part) QALORA_INLINE {
    const Rows<V, bits, wide, inside> rows(few, n + part.k * wide, end - 1);
    FewTile<V, bits, digits, wide>(few, rows, half, sum + part.k * wide);
  });
  const size_t bytes = (inside || end - n > kQuad ? kQuad : end - n) * sizeof(float);
  Four added = {};
  if (job.bias) std::memcpy(&added, job.bias + n, bytes);
  const Four line = V::Reduce4(sum[0], sum[1], sum[2], sum[3]) + added;
  std::memcpy(job.y + m * job.layer->n + n, &line, bytes);
}

// The last weight rows.
template <class V, int bits, int digits>
QALORA_ONCE void LastRows(const Job& job, int64_t begin, int64_t end, int64_t m) {
  const FewJob<V> few(job, m);
  for (int64_t n = begin; n < end; n += kQuad) {
    FewQuad<V, bits, digits, false>(job, few, few.half, n, end, m);
  }
}

// Weight rows [begin, end) against row m of x.
template <class V, int bits, int digits, bool half>
QALORA_ONCE void HalfRows(const Job& job, int64_t begin, int64_t end, int64_t m) {
  const FewJob<V> few(job, m);
  const int64_t inside = end < job.plan.inside_rows ? end : job.plan.inside_rows;
  int64_t n = begin;
  for (; n + kQuad <= inside; n += kQuad) {
    FewQuad<V, bits, digits, true>(job, few, half, n, end, m);
  }
  if (n < end) LastRows<V, bits, digits>(job, n, end, m);
}

template <class V, int bits, int digits>
void FewRows(const Job& job, int64_t begin, int64_t end, int64_t m) {
  job.half_parameters ? HalfRows<V, bits, digits, true>(job, begin, end, m)
                      : HalfRows<V, bits, digits, false>(job, begin, end, m);
}

template <class V, int bits, int digits>
void RunFew(const Job& job, int64_t begin, int64_t end) {
  const int64_t run = job.rows > 1 ? kRunRows : end - begin;
  for (int64_t n = begin; n < end; n += run) {
    const int64_t last = n + run < end ? n + run : end;
    for (int64_t m = 0; m < job.rows; ++m) {
      FewRows<V, bits, digits>(job, n, last, m);
    }
  }
}

}  // namespace
}  // namespace qalora
