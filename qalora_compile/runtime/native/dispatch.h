// Which kernels this CPU takes.
#pragma once

#include "kernels.h"

namespace qalora {

// The fastest level of this CPU.
const KernelSet* BestKernels();

// The level that the environment variable QALORA_KERNEL names, or the fastest where it is unset or
// empty. Null with `error` filled where this CPU, or this build, has no such level.
const KernelSet* ChooseKernels(Error* error);

// The level called `name`, or null where this CPU has none.
const KernelSet* FindKernels(const char* name);

// Names of the levels of this CPU, slowest first, with commas.
const char* KernelNames();

// Why a level that this CPU has is not among them; empty where none is missing.
const char* KernelNote();

}  // namespace qalora
