// AMX, emulated, on vectors of AVX2.
#include "emulated.h"

#if defined(QALORA_X86)

#include "avx2_vector.h"
#include "emulated_tiles.h"

namespace qalora_test {
namespace {

struct Avx2 : qalora::Avx2Base {
  static Sum LoadSum(const int32_t* p) { return Load(reinterpret_cast<const uint8_t*>(p)); }
  static Sum Join(Sum high, Sum low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 7), low); }
};

}  // namespace

const qalora::KernelSet* EmulatedAmx2() {
  using V = qalora::Tiled<Avx2, qalora::EmulatedTiles>;
  static const qalora::KernelSet kernels =
      qalora::MakeMatrixKernels<V, qalora::kAvx2Kernels>("emulated-amx-avx2");
  return &kernels;
}

}  // namespace qalora_test

#endif  // QALORA_X86
