// AVX2 with AVX-VNNI, which CPUs without AVX-512 have since 2021.

#include "kernels.h"

#if defined(QALORA_X86) && defined(__AVXVNNI__)

#include "avx2_vector.h"

namespace qalora {
namespace {

struct AvxVnni : Avx2Base {
  static constexpr int kPanelDigits = 2;
  template <int bits>
  static Acc Seed(Sum total) { return _mm256_slli_epi32(total, 7); }
  template <int bits>
  static Acc Dot(Acc acc, I codes, I x) { return _mm256_dpbusd_avx_epi32(acc, codes, x); }
  template <int bits, bool more>
  static Sum Settle(Sum, Acc acc) { return acc; }
};

constexpr KernelSet kKernels = MakeKernels<AvxVnni>("avxvnni");

}  // namespace

const KernelSet* AvxVnniKernels() { return &kKernels; }

}  // namespace qalora

#elif defined(QALORA_X86)

namespace qalora {

// The compiler is older than the instructions.
const KernelSet* AvxVnniKernels() { return nullptr; }

}  // namespace qalora

#endif
