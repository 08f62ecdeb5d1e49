// AVX2 with FMA and F16C, for the levels that differ in their integer products.
#pragma once

#include <immintrin.h>

#include "kernel_template.h"

namespace qalora {
namespace {

struct Avx2Base {
  using I = __m256i;
  using F = __m256;
  using Sum = __m256i;
  using Acc = __m256i;
  using Lanes = __m256i;
  static constexpr int kStep = 32;
  static constexpr int kLanes = 8;
  static constexpr int kWide = 2;
  static constexpr int kTall = 6;

  // Read once: GCC would read it for each use, and many loads lie across two cache lines.
  static I Load(const uint8_t* p) {
    I a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    asm("" : "+x"(a));
    return a;
  }
  static I LoadPartial(const uint8_t* p, int64_t count) {
    alignas(32) uint8_t bytes[32] = {};
    std::memcpy(bytes, p, count);
    return Load(bytes);
  }
  static void Store(uint8_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static I SetBytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static I And(I a, I b) { return _mm256_and_si256(a, b); }
  static I Or(I a, I b) { return _mm256_or_si256(a, b); }
  template <int bits>
  static I Shr(I a) {
    if constexpr (bits == 0) return a;
    return _mm256_srli_epi32(a, bits);
  }
  template <int width, int index>
  static F Field(I a) {
    // The last field needs no mask, the shift leaves nothing above it.
    const I field = Shr<width * index>(a);
    if constexpr (width * (index + 1) == 32) return _mm256_cvtepi32_ps(field);
    return _mm256_cvtepi32_ps(And(field, _mm256_set1_epi32((1 << width) - 1)));
  }
  template <int index>
  static F SmallByte(I a) { return Field<8, index>(a); }

  // The high bits of the 32 bytes.
  using High = HighWords<uint32_t>;
  template <int f>
  static I AddHigh(I codes, const High& high) {
    const I each = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const I bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
    const I word = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(high.bits[f])), each);
    const I set = _mm256_cmpeq_epi8(And(word, bit), bit);
    return Or(codes, And(set, SetBytes(4)));
  }

  static Acc ZeroAcc() { return _mm256_setzero_si256(); }
  static I LoadX(const int8_t* x) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  }
  static I BroadcastX(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
  }
  static F ToFloat(Sum total) { return _mm256_cvtepi32_ps(total); }

  static I Bits(F a) { return _mm256_castps_si256(a); }
  static F Floats(I a) { return _mm256_castsi256_ps(a); }
  static void Transpose(I (&rows)[8]) {
    I t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // rows[4 j + i]: word i of each 128-bit half of the rows 4 j to 4 j + 3.
    for (int j = 0; j < 8; j += 4) {
      rows[j] = _mm256_unpacklo_epi64(t[j], t[j + 2]);
      rows[j + 1] = _mm256_unpackhi_epi64(t[j], t[j + 2]);
      rows[j + 2] = _mm256_unpacklo_epi64(t[j + 1], t[j + 3]);
      rows[j + 3] = _mm256_unpackhi_epi64(t[j + 1], t[j + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x20);
      t[i + 4] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) rows[i] = t[i];
  }

  static F ZeroF() { return _mm256_setzero_ps(); }
  static F SetF(float value) { return _mm256_set1_ps(value); }
  static F LoadF(const float* p) { return _mm256_loadu_ps(p); }
  static void StoreF(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F Negate(F a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F Max(F a, F b) { return _mm256_max_ps(a, b); }
  static void StreamF(float* p, F a) { _mm256_stream_ps(p, a); }
  static void Fence() { _mm_sfence(); }
  // The sum of the lanes of each, all in the same order.
  static Four Reduce4(F a, F b, F c, F d) {
    const F ab = Add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const F cd = Add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    const F sum = Add(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
    return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  }
  static Lanes LoadLanes(const int32_t* lane) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane));
  }
  static F Permute(F a, Lanes lane) { return _mm256_permutevar8x32_ps(a, lane); }
  static F LoadParameter(const void* p, bool half, int64_t at, int64_t count) {
    if (count < kLanes) return LoadParameterTail(p, half, at, count);
    if (!half) return LoadF(static_cast<const float*>(p) + at);
    const uint16_t* from = static_cast<const uint16_t*>(p) + at;
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static F LoadParameterTail(const void* p, bool half, int64_t at, int64_t count) {
    alignas(32) uint16_t halves[8] = {};
    alignas(32) float floats[8] = {};
    if (half) {
      std::memcpy(halves, static_cast<const uint16_t*>(p) + at, count * sizeof(uint16_t));
      return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(halves)));
    }
    std::memcpy(floats, static_cast<const float*>(p) + at, count * sizeof(float));
    return LoadF(floats);
  }
  // Always inlined: GCC takes a function that only prefetches for one without effect, and drops it.
  // Into all caches: with the hint for data that is read once, an Intel Xeon reads memory at half speed.
  static inline __attribute__((always_inline)) void Prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }

  static uint32_t LargestBits16(const float* x) {
    const I magnitude = _mm256_set1_epi32(0x7fffffff);
    const I a = And(_mm256_castps_si256(LoadF(x)), magnitude);
    const I b = And(_mm256_castps_si256(LoadF(x + 8)), magnitude);
    const I c = _mm256_max_epi32(a, b);
    __m128i top = _mm_max_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(top));
  }
  static int32_t Round16(const float* x, float inverse, int32_t* out) {
    const F factor = _mm256_set1_ps(inverse);
    const I a = _mm256_cvtps_epi32(Mul(LoadF(x), factor));
    const I b = _mm256_cvtps_epi32(Mul(LoadF(x + 8), factor));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), b);
    const I sums = _mm256_add_epi32(a, b);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
  }
  static void StoreHalf(uint16_t* to, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
}  // namespace qalora
