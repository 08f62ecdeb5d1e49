// AVX2 with FMA and F16C.

#include "kernels.h"

#if defined(QALORA_X86)

#include "avx2_vector.h"

namespace qalora {
namespace {

// Sums of products are 16 bits wide on their way: eight pairs of codes below 16 and digits fit, as
// 8 * 2 * 15 * 127 < 2^15. Of codes of 8 bits not even one pair does, so each nibble is multiplied for
// itself, and their sums are 32 bits wide.
struct Avx2 : Avx2Base {
  static constexpr int kPanelDigits = 1;
  template <int bits>
  static Acc Seed(Sum total) { return bits < 8 ? ZeroAcc() : _mm256_slli_epi32(total, 7); }
  template <int bits>
  static Acc Dot(Acc acc, I codes, I x) {
    if constexpr (bits < 8) return _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, x));
    const I mask = SetBytes(0x0f);
    const I low = _mm256_maddubs_epi16(And(codes, mask), x);
    const I high = _mm256_maddubs_epi16(And(Shr<4>(codes), mask), x);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
  template <int bits, bool more>
  static Sum Settle(Sum total, Acc acc) {
    if constexpr (bits == 8) return acc;
    const Sum sum = _mm256_madd_epi16(acc, _mm256_set1_epi16(1));
    if constexpr (!more) return sum;
    return _mm256_add_epi32(_mm256_slli_epi32(total, 7), sum);
  }
};

}  // namespace

const KernelSet kAvx2Kernels = MakeKernels<Avx2>("avx2");

}  // namespace qalora

#endif  // QALORA_X86
