// Levels for CPUs that are not at hand: the library's own code, with their instructions emulated.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace qalora_test {

// Their names; none on CPUs without the vectors that they take.
std::vector<std::string> EmulatedNames();

// The library's level of this CPU, or the emulated one, called `name`; null where there is neither.
const qalora::KernelSet* FindLevel(const char* name);

// Whether the library's check of tiles passes those that are right, and no others.
bool TilesAreChecked();

#if defined(QALORA_X86)
const qalora::KernelSet* EmulatedAmx2();    // on vectors of AVX2
const qalora::KernelSet* EmulatedAmx512();  // on vectors of AVX-512
#endif

}  // namespace qalora_test
