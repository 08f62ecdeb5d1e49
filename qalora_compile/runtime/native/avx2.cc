// AVX2 with FMA and F16C.

#include "kernels.h"

#if defined(QALORA_X86)

#include <immintrin.h>

#include "prepare_template.h"

namespace qalora {
namespace {

struct Avx2 {
  using I = __m256i;
  using F = __m256;
  using Acc = __m256i;  // 16-bit lanes
  static constexpr int kStep = 32;
  static constexpr int kLanes = 8;
  static constexpr int kTileM = 3;
  static constexpr int kInt8M = 2;

  static I Load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I LoadPartial(const uint8_t* p, int64_t count) {
    alignas(32) uint8_t bytes[32] = {};
    std::memcpy(bytes, p, count);
    return Load(bytes);
  }
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

  // Codes below 16 in at most four planes: 4 * 2 * 15 * 127 fits 16 bits.
  static Acc ZeroAcc() { return _mm256_setzero_si256(); }
  static Acc Dot(Acc acc, I codes, const int8_t* x) {
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, LoadX(x)));
  }
  static F SumAcc(Acc acc) {
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(acc, _mm256_set1_epi16(1)));
  }
  // 255 * 127 * 2 does not fit, so each nibble for itself.
  static F DotBytes(I codes, const int8_t* x) {
    const I mask = SetBytes(0x0f);
    const I low = _mm256_maddubs_epi16(And(codes, mask), LoadX(x));
    const I high = _mm256_maddubs_epi16(And(Shr<4>(codes), mask), LoadX(x));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(low, _mm256_set1_epi16(1)),
                                               _mm256_madd_epi16(high, _mm256_set1_epi16(16))));
  }
  static I LoadX(const int8_t* x) { return Load(reinterpret_cast<const uint8_t*>(x)); }

  static F ZeroF() { return _mm256_setzero_ps(); }
  static F LoadF(const float* p) { return _mm256_loadu_ps(p); }
  static void StoreF(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F Negate(F a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float Reduce(F a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static F LaneValues(const float* groups, const LaneMap& map, int64_t step) {
    const I index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(map.lane + step * kLanes));
    return _mm256_permutevar8x32_ps(LoadF(groups + map.first[step]), index);
  }
  template <int lanes>
  static F BlockValues(const float* blocks, int64_t step) {
    const float* from = blocks + step * kLanes / lanes;
    if constexpr (lanes == kLanes) return _mm256_set1_ps(*from);
    const I index = _mm256_setr_epi32(0, 1 / lanes, 2 / lanes, 3 / lanes, 4 / lanes, 5 / lanes,
                                      6 / lanes, 7 / lanes);
    return _mm256_permutevar8x32_ps(LoadF(from), index);
  }
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
  static inline __attribute__((always_inline)) void Prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
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
  static int32_t Quantize16(const float* x, float inverse, int8_t* out) {
    const F factor = _mm256_set1_ps(inverse);
    const I a = _mm256_cvtps_epi32(Mul(LoadF(x), factor));
    const I b = _mm256_cvtps_epi32(Mul(LoadF(x + 8), factor));
    const I words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
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

const KernelSet kAvx2Kernels = MakeKernels<Avx2>("avx2");

}  // namespace qalora

#endif  // QALORA_X86
