// Arm NEON with the dot product instructions of Armv8.2 (asimddp).

#include "kernels.h"

#if defined(QALORA_ARM64)

#include "kernel_template.h"
#include "neon_vector.h"

namespace qalora {

const KernelSet kNeonKernels = MakeKernels<Neon>("neon");

}  // namespace qalora

#endif  // QALORA_ARM64
