// AMX, emulated, on vectors of AVX-512, as the level `amx` has them.
#include "emulated.h"

#if defined(QALORA_X86)

#include "avx512_vector.h"
#include "emulated_tiles.h"

namespace qalora_test {

const qalora::KernelSet* EmulatedAmx512() {
  using V = qalora::Tiled<qalora::Avx512, qalora::EmulatedTiles>;
  static const qalora::KernelSet kernels =
      qalora::MakeMatrixKernels<V, qalora::kAvx512Kernels>("emulated-amx-avx512");
  return &kernels;
}

}  // namespace qalora_test

#endif  // QALORA_X86
