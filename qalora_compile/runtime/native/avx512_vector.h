// Vectors of AVX-512, for the levels with and without tiles.
#pragma once

#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operands inside its own intrinsics for mistakes of the caller.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include "codec_template.h"

namespace qalora {
namespace {

struct Avx512 {
  using I = __m512i;
  using F = __m512;
  using Sum = __m512i;
  using Acc = __m512i;
  using Lanes = __m512i;
  static constexpr int kStep = 64;
  static constexpr int kLanes = 16;
  static constexpr int kPanelDigits = 3;
  static constexpr int kWide = 4;
  static constexpr int kTall = 12;

  // Read once: GCC would read it for each use, and most loads lie across two cache lines.
  static I Load(const uint8_t* p) {
    I a = _mm512_loadu_si512(p);
    asm("" : "+v"(a));
    return a;
  }
  static I LoadPartial(const uint8_t* p, int64_t count) {
    return _mm512_maskz_loadu_epi8((1ull << count) - 1, p);
  }
  static void Store(uint8_t* p, I a) { _mm512_store_si512(p, a); }
  static I SetBytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static I And(I a, I b) { return _mm512_and_si512(a, b); }
  template <int bits>
  static I Shr(I a) {
    if constexpr (bits == 0) return a;
    return _mm512_srli_epi32(a, bits);
  }
  // Up to 4 bits: the permutation looks only at the low four bits of its index, so the table is the
  // mask too. For 2 bits it holds 0 to 3 four times.
  template <int width, int index>
  static F Field(I a) {
    const I field = Shr<width * index>(a);
    if constexpr (width == 8) {
      return _mm512_cvtepi32_ps(And(field, _mm512_set1_epi32(0xff)));
    } else {
      constexpr int m = (1 << width) - 1;
      return _mm512_permutexvar_ps(
          field, _mm512_setr_ps(0, 1, 2, 3, 4 & m, 5 & m, 6 & m, 7 & m, 8 & m, 9 & m, 10 & m, 11 & m,
                                12 & m, 13 & m, 14 & m, 15 & m));
    }
  }
  // The permutation that Field uses, on codes below 16.
  template <int index>
  static F SmallByte(I a) {
    return _mm512_permutexvar_ps(Shr<8 * index>(a), _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                  11, 12, 13, 14, 15));
  }

  // The high bits of the 64 bytes: a unit, whose words are masks as they are.
  using High = HighWords<uint64_t>;
  template <int f>
  static I AddHigh(I codes, const High& high) {
    return _mm512_mask_add_epi8(codes, high.bits[f], codes, SetBytes(4));
  }

  static Acc ZeroAcc() { return _mm512_setzero_si512(); }
  static I LoadX(const int8_t* x) { return _mm512_loadu_si512(x); }
  static I BroadcastX(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
  }
  template <int bits>
  static Acc Seed(Sum total) { return _mm512_slli_epi32(total, 7); }
  template <int bits>
  static Acc Dot(Acc acc, I codes, I x) { return _mm512_dpbusd_epi32(acc, codes, x); }
  template <int bits, bool more>
  static Sum Settle(Sum, Acc acc) { return acc; }
  static F ToFloat(Sum total) { return _mm512_cvtepi32_ps(total); }
  // For tiles: sums from memory, and those of a digit with those of the next one.
  static Sum LoadSum(const int32_t* p) { return _mm512_load_si512(p); }
  static Sum Join(Sum high, Sum low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low); }

  static I Bits(F a) { return _mm512_castps_si512(a); }
  static F Floats(I a) { return _mm512_castsi512_ps(a); }
  static void Transpose(I (&rows)[16]) {
    I t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // rows[4 j + i]: word i of each 128-bit part of the rows 4 j to 4 j + 3.
    for (int j = 0; j < 16; j += 4) {
      rows[j] = _mm512_unpacklo_epi64(t[j], t[j + 2]);
      rows[j + 1] = _mm512_unpackhi_epi64(t[j], t[j + 2]);
      rows[j + 2] = _mm512_unpacklo_epi64(t[j + 1], t[j + 3]);
      rows[j + 3] = _mm512_unpackhi_epi64(t[j + 1], t[j + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
  }

  static F ZeroF() { return _mm512_setzero_ps(); }
  static F SetF(float value) { return _mm512_set1_ps(value); }
  static F LoadF(const float* p) { return _mm512_loadu_ps(p); }
  static void StoreF(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Negate(F a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static void StreamF(float* p, F a) { _mm512_stream_ps(p, a); }
  static void Fence() { _mm_sfence(); }
  // The sum of the lanes of each, all in the same order.
  static Four Reduce4(F a, F b, F c, F d) {
    const F ab = Add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const F cd = Add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const F sum = Add(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  static Lanes LoadLanes(const int32_t* lane) { return _mm512_loadu_si512(lane); }
  static F Permute(F a, Lanes lane) { return _mm512_permutexvar_ps(lane, a); }
  static F LoadParameter(const void* p, bool half, int64_t at, int64_t count) {
    if (__builtin_expect(count < kLanes, 0)) return LoadParameterTail(p, half, at, count);
    if (!half) return LoadF(static_cast<const float*>(p) + at);
    const uint16_t* from = static_cast<const uint16_t*>(p) + at;
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static F LoadParameterTail(const void* p, bool half, int64_t at, int64_t count) {
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    if (!half) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + at);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + at));
  }
  // Always inlined: GCC takes a function that only prefetches for one without effect, and drops it.
  // Into all caches: with the hint for data that is read once, an Intel Xeon reads memory at half speed.
  static inline __attribute__((always_inline)) void Prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }

  static uint32_t LargestBits16(const float* x) {
    const I bits = And(_mm512_castps_si512(LoadF(x)), _mm512_set1_epi32(0x7fffffff));
    return static_cast<uint32_t>(_mm512_reduce_max_epi32(bits));
  }
  static int32_t Round16(const float* x, float inverse, int32_t* out) {
    const I codes = _mm512_cvtps_epi32(Mul(LoadF(x), _mm512_set1_ps(inverse)));
    _mm512_storeu_si512(out, codes);
    return _mm512_reduce_add_epi32(codes);
  }
  static void StoreHalf(uint16_t* to, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
}  // namespace qalora
