// AVX-512 F, BW, DQ, VL and VNNI.

#include "kernels.h"

#if defined(QALORA_X86)

#include "avx512_vector.h"
#include "kernel_template.h"

namespace qalora {

const KernelSet kAvx512Kernels = MakeKernels<Avx512>("avx512");

}  // namespace qalora

#endif  // QALORA_X86
