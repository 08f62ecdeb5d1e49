// Attention of some rows of queries over the keys and values of one head, in float32.
//
// Up to kAttentionTile rows go together, so that a key or value is loaded once for all of them. All
// products with keys come first, then the softmax, then the products with values.
#pragma once

#include <cstring>

#include "codec_template.h"

namespace qalora {
namespace {

// Keys or values of one head: those of the past, then the new ones.
struct CacheRows {
  const float* past;
  const float* fresh;
  int64_t past_count;
  int64_t fresh_stride;
  int64_t width;
  float* present;  // null: nothing is copied
  bool once;       // nothing reads them again in this call, and memory is asked for ahead
};

// `count` rows from `first` on, none of which is behind rows of the other kind.
struct CacheBlock {
  const float* rows;
  int64_t stride;
  int64_t first;
  int64_t count;
  bool once;
};

// Calls fn(block) for all rows in order.
template <class Function>
inline void EachBlock(const CacheRows& cache, int64_t total, Function fn) {
  for (int64_t first = 0; first < total;) {
    const bool past = first < cache.past_count;
    const int64_t end = past ? cache.past_count : total;
    const int64_t count = end - first < kAttentionBlock ? end - first : kAttentionBlock;
    const float* rows = past ? cache.past + first * cache.width
                             : cache.fresh + (first - cache.past_count) * cache.fresh_stride;
    fn(CacheBlock{rows, past ? cache.width : cache.fresh_stride, first, count, cache.once});
    first += count;
  }
}

// Rows that lie together, past the caches: nobody reads them before the next call.
template <class V>
inline void CopyRows(const float* from, float* to, int64_t count) {
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % (V::kLanes * sizeof(float)) == 0) {
    for (; i + V::kLanes <= count; i += V::kLanes) V::StreamF(to + i, V::LoadF(from + i));
  }
  std::memcpy(to + i, from + i, static_cast<size_t>(count - i) * sizeof(float));
}

template <class V>
inline void Append(const CacheRows& cache, const CacheBlock& block) {
  if (!cache.present) return;
  float* to = cache.present + block.first * cache.width;
  if (to == block.rows) return;  // a shared buffer
  if (block.stride == cache.width) return CopyRows<V>(block.rows, to, block.count * cache.width);
  for (int64_t i = 0; i < block.count; ++i) {
    CopyRows<V>(block.rows + i * block.stride, to + i * cache.width, cache.width);
  }
}

// Asks for the memory that a row is ahead of, where it is read once; past the end of the rows lie those
// of the next head.
template <class V>
inline __attribute__((always_inline)) void PrefetchRow(const float* row, int64_t width) {
  const char* ahead = reinterpret_cast<const char*>(row) + kCodesAhead;
  const int64_t bytes = width * static_cast<int64_t>(sizeof(float));
  for (int64_t at = 0; at < bytes; at += 64) V::Prefetch(ahead + at);
}

// A vector of floats, of which the last of a row may have fewer.
template <class V>
inline typename V::F LoadPart(const float* from, int64_t at, int64_t count) {
  const int64_t left = count - at;
  return left >= V::kLanes ? V::LoadF(from + at) : V::LoadParameter(from, false, at, left);
}

template <class To, class From>
inline To BitsAs(From from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// As many 32-bit words.
template <int bytes>
struct WordsOf {
  typedef uint32_t Type __attribute__((vector_size(bytes)));
};

// e^x for x at most 0, with a relative error of about 1e-7; below -87 a number below 1e-37.
template <class V>
inline typename V::F ExpOfNegative(typename V::F x) {
  using F = typename V::F;
  using Words = typename WordsOf<sizeof(F)>::Type;
  // The integer nearest to x / log(2), in the low bits of a float of this size.
  const F shift = V::SetF(12582912.0f);
  x = V::Max(V::SetF(-87.0f), x);
  const F shifted = V::Fma(x, V::SetF(1.44269504f), shift);
  const F n = V::Sub(shifted, shift);
  F rest = V::Fma(n, V::SetF(-0.693359375f), x);
  rest = V::Fma(n, V::SetF(2.12194440e-4f), rest);
  // Taylor's series: |rest| is at most log(2) / 2.
  F sum = V::SetF(1.0f / 5040);
  const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float term : terms) sum = V::Fma(sum, rest, V::SetF(term));
  const Words exponent = (BitsAs<Words>(shifted) << 23) + 0x3f800000u;
  return V::Mul(sum, BitsAs<F>(exponent));
}

// Products of `rows` queries [rows, pitch of a query] with the keys of a block.
template <class V, int rows>
void MultiplyKeys(const float* queries, int64_t query_pitch, int64_t width, const CacheBlock& block,
                  float* scores, int64_t pitch) {
  for (int64_t t = 0; t < block.count; t += 4) {
    const float* keys[4];
    for (int64_t i = 0; i < 4; ++i) {
      keys[i] = block.rows + (t + i < block.count ? t + i : block.count - 1) * block.stride;
      if (block.once) PrefetchRow<V>(keys[i], width);
    }
    typename V::F acc[rows][4];
    for (auto& line : acc) {
      for (auto& value : line) value = V::ZeroF();
    }
    for (int64_t at = 0; at < width; at += V::kLanes) {
      typename V::F key[4];
      Unroll<4>([&](auto i) QALORA_INLINE { key[i.k] = LoadPart<V>(keys[i.k], at, width); });
      Unroll<rows>([&](auto r) QALORA_INLINE {
        const auto query = V::LoadF(queries + r.k * query_pitch + at);
        Unroll<4>([&](auto i) QALORA_INLINE {
          acc[r.k][i.k] = V::Fma(query, key[i.k], acc[r.k][i.k]);
        });
      });
    }
    Unroll<rows>([&](auto r) QALORA_INLINE {
      const Four line = V::Reduce4(acc[r.k][0], acc[r.k][1], acc[r.k][2], acc[r.k][3]);
      std::memcpy(scores + r.k * pitch + block.first + t, &line, sizeof line);
    });
  }
}

// Adds to sums [rows, sum_pitch] the values of a block times their weights, `columns` vectors from
// `at` on.
template <class V, int rows, int columns>
inline void MultiplyColumns(const float* weights, int64_t pitch, const CacheBlock& block,
                            int64_t at, int64_t width, float* sums, int64_t sum_pitch) {
  typename V::F acc[rows][columns];
  for (auto& line : acc) {
    for (auto& value : line) value = V::ZeroF();
  }
  const float* values = block.rows;
  for (int64_t t = block.first; t < block.first + block.count; ++t, values += block.stride) {
    if (block.once && at == 0) PrefetchRow<V>(values, width);
    typename V::F value[columns];
    Unroll<columns>([&](auto c) QALORA_INLINE {
      const int64_t from = at + c.k * V::kLanes;
      value[c.k] = columns > 1 ? V::LoadF(values + from) : LoadPart<V>(values, from, width);
    });
    Unroll<rows>([&](auto r) QALORA_INLINE {
      const auto weight = V::SetF(weights[r.k * pitch + t]);
      Unroll<columns>([&](auto c) QALORA_INLINE {
        acc[r.k][c.k] = V::Fma(weight, value[c.k], acc[r.k][c.k]);
      });
    });
  }
  Unroll<rows>([&](auto r) QALORA_INLINE {
    Unroll<columns>([&](auto c) QALORA_INLINE {
      float* to = sums + r.k * sum_pitch + at + c.k * V::kLanes;
      V::StoreF(to, V::Add(V::LoadF(to), acc[r.k][c.k]));
    });
  });
}

template <class V, int rows>
void MultiplyValues(const float* weights, int64_t pitch, int64_t width, const CacheBlock& block,
                    float* sums, int64_t sum_pitch) {
  constexpr int columns = V::kLanes == 8 ? 2 : 4;  // AVX2 has 16 registers, the others 32
  int64_t at = 0;
  for (; at + columns * V::kLanes <= width; at += columns * V::kLanes) {
    MultiplyColumns<V, rows, columns>(weights, pitch, block, at, width, sums, sum_pitch);
  }
  for (; at < width; at += V::kLanes) {
    MultiplyColumns<V, rows, 1>(weights, pitch, block, at, width, sums, sum_pitch);
  }
}

// Where a masked score lies: no sum reaches it.
constexpr float kMasked = -3.40282347e38f;
// What counts as no score at all, behind the last.
constexpr float kNothing = -__builtin_inff();

// Keys [begin, end) outside of which a row masks all; none where it masks all.
struct KeyRange {
  int64_t begin;
  int64_t end;
  bool empty() const { return begin >= end; }
};

inline KeyRange KeptKeys(const AttentionJob& job, int64_t row, int64_t total) {
  KeyRange kept{0, total};
  if (!job.shape.bool_mask) return kept;
  const uint8_t* mask = static_cast<const uint8_t*>(job.mask) + row * total;
  while (kept.end > 0 && !mask[kept.end - 1]) --kept.end;
  if (kept.end == 0) return kept;
  while (!mask[kept.begin]) ++kept.begin;
  return kept;
}

inline void Mask(const AttentionJob& job, int64_t row, KeyRange keys, int64_t total, float* scores) {
  if (!job.shape.bool_mask) {
    const float* mask = static_cast<const float*>(job.mask) + row * total;
    for (int64_t t = keys.begin; t < keys.end; ++t) scores[t] += mask[t];
    return;
  }
  const uint8_t* mask = static_cast<const uint8_t*>(job.mask) + row * total;
  if (!std::memchr(mask + keys.begin, 0, static_cast<size_t>(keys.end - keys.begin))) return;
  for (int64_t t = keys.begin; t < keys.end; ++t) scores[t] = mask[t] ? scores[t] : kMasked;
}

// Scores to weights, not yet divided by their sum, which is returned. Up to a vector more is written.
template <class V>
float Soften(float* scores, KeyRange keys) {
  for (int64_t i = 0; i < V::kLanes; ++i) scores[keys.end + i] = kNothing;
  auto most = V::SetF(kNothing);
  for (int64_t t = keys.begin; t < keys.end; t += V::kLanes) {
    most = V::Max(most, V::LoadF(scores + t));
  }
  float lanes[V::kLanes];
  V::StoreF(lanes, most);
  float largest = lanes[0];
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  const auto peak = V::SetF(largest);
  auto sum = V::ZeroF();
  for (int64_t t = keys.begin; t < keys.end; t += V::kLanes) {
    const auto weight = ExpOfNegative<V>(V::Sub(V::LoadF(scores + t), peak));
    V::StoreF(scores + t, weight);
    sum = V::Add(sum, weight);
  }
  const Four added = V::Reduce4(sum, V::ZeroF(), V::ZeroF(), V::ZeroF());
  float total;
  std::memcpy(&total, &added, sizeof total);
  return total;
}

inline int64_t PaddedWidth(int64_t width) { return (width + 15) / 16 * 16; }

inline CacheBlock Within(const CacheBlock& block, KeyRange keys) {
  const int64_t first = block.first > keys.begin ? block.first : keys.begin;
  const int64_t stop = block.first + block.count;
  const int64_t end = stop < keys.end ? stop : keys.end;
  const int64_t skipped = end > first ? first - block.first : 0;
  const int64_t count = end > first ? end - first : 0;
  return {block.rows + skipped * block.stride, block.stride, first, count, block.once};
}

// The place of row r: of its query in q, and of its line of the mask.
struct RowPlace {
  int64_t vector;
  int64_t mask;
};

inline RowPlace PlaceOf(const AttentionShape& shape, const AttentionPart& part, int64_t r) {
  const int64_t query = r / shape.sharing();
  const int64_t head = part.kv_head * shape.sharing() + r % shape.sharing();
  const int64_t batch = shape.mask_batch > 1 ? part.batch : 0;
  const int64_t line = shape.mask_heads > 1 ? head : 0;
  return {(part.batch * shape.queries + query) * shape.heads + head,
          (batch * shape.mask_heads + line) * shape.queries + query};
}

template <class V, int rows>
QALORA_ONCE void AttendTile(const AttentionJob& job, const AttentionPart& part, int64_t first,
                            const CacheRows& keys, const CacheRows& values, float* scratch) {
  const AttentionShape& shape = job.shape;
  const int64_t total = shape.total(), pitch = PaddedWidth(total) + 32;
  const int64_t query_pitch = PaddedWidth(shape.width), sum_pitch = PaddedWidth(shape.value_width);
  float* scores = scratch;
  float* queries = scores + kAttentionTile * pitch;
  float* sums = queries + kAttentionTile * query_pitch;
  std::memset(queries, 0, static_cast<size_t>(rows * query_pitch) * sizeof(float));
  std::memset(sums, 0, static_cast<size_t>(rows * sum_pitch) * sizeof(float));
  RowPlace places[rows];
  KeyRange kept[rows], all{total, 0};
  for (int r = 0; r < rows; ++r) {
    places[r] = PlaceOf(shape, part, first + r);
    kept[r] = KeptKeys(job, places[r].mask, total);
    if (!kept[r].empty() && kept[r].begin < all.begin) all.begin = kept[r].begin;
    if (kept[r].end > all.end) all.end = kept[r].end;
    const float* query = job.q + places[r].vector * shape.width;
    for (int64_t i = 0; i < shape.width; ++i) queries[r * query_pitch + i] = query[i] * job.scale;
  }
  EachBlock(keys, total, [&](const CacheBlock& block) {
    const CacheBlock read = Within(block, all);
    MultiplyKeys<V, rows>(queries, query_pitch, shape.width, read, scores, pitch);
    Append<V>(keys, block);
  });
  float inverse[rows];
  for (int r = 0; r < rows; ++r) {
    float* line = scores + r * pitch;
    inverse[r] = 0.0f;
    if (!kept[r].empty()) {
      Mask(job, places[r].mask, kept[r], total, line);
      inverse[r] = 1.0f / Soften<V>(line, kept[r]);
    }
    for (int64_t t = all.begin; t < kept[r].begin; ++t) line[t] = 0.0f;
    for (int64_t t = kept[r].end; t < all.end; ++t) line[t] = 0.0f;
  }
  EachBlock(values, total, [&](const CacheBlock& block) {
    const CacheBlock read = Within(block, all);
    MultiplyValues<V, rows>(scores, pitch, shape.value_width, read, sums, sum_pitch);
    Append<V>(values, block);
  });
  for (int r = 0; r < rows; ++r) {
    float* y = job.y + places[r].vector * shape.value_width;
    for (int64_t i = 0; i < shape.value_width; ++i) y[i] = sums[r * sum_pitch + i] * inverse[r];
  }
}

// The keys (or values) of a part's head.
inline CacheRows RowsOf(const AttentionShape& shape, const AttentionPart& part, const float* past,
                        const float* fresh, float* present, int64_t width) {
  const int64_t head = part.batch * shape.kv_heads + part.kv_head;
  float* own = present + head * shape.present_rows * width;
  if (part.appended) return {own, nullptr, shape.total(), 0, width, nullptr, false};
  return {past + head * shape.past_rows * width,
          fresh + (part.batch * shape.queries * shape.kv_heads + part.kv_head) * width,
          shape.past, shape.kv_heads * width, width, part.append ? own : nullptr,
          part.end - part.begin <= kAttentionTile};
}

// The rows of a buffer that lie behind the cache, where the present buffer is another.
template <class V>
inline void CopyRest(const CacheRows& cache, const AttentionShape& shape) {
  if (!cache.present || cache.present == cache.past || shape.present_rows == shape.total()) return;
  const int64_t from = shape.total() * cache.width;
  CopyRows<V>(cache.past + from, cache.present + from, shape.present_rows * cache.width - from);
}

template <class V>
void Attend(const AttentionJob& job, const AttentionPart& part, float* scratch) {
  const AttentionShape& shape = job.shape;
  CacheRows keys = RowsOf(shape, part, job.past_key, job.k, job.present_key, shape.width);
  CacheRows values =
      RowsOf(shape, part, job.past_value, job.v, job.present_value, shape.value_width);
  CopyRest<V>(keys, shape);
  CopyRest<V>(values, shape);
  if (part.begin == part.end) {
    EachBlock(keys, shape.total(), [&](const CacheBlock& block) { Append<V>(keys, block); });
    EachBlock(values, shape.total(), [&](const CacheBlock& block) { Append<V>(values, block); });
  }
  for (int64_t row = part.begin; row < part.end; row += kAttentionTile) {
    switch (part.end - row) {
      case 1: AttendTile<V, 1>(job, part, row, keys, values, scratch); break;
      case 2: AttendTile<V, 2>(job, part, row, keys, values, scratch); break;
      case 3: AttendTile<V, 3>(job, part, row, keys, values, scratch); break;
      default: AttendTile<V, 4>(job, part, row, keys, values, scratch);
    }
    keys.present = values.present = nullptr;
  }
  V::Fence();
}

}  // namespace
}  // namespace qalora
