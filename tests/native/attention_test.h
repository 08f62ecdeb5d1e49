// Attention of every level against a reference in double.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace qalora_test {

// Tests one level with cases that are drawn, fewer of them where `quick`; adds to `cases`.
bool TestAttention(const qalora::KernelSet& level, bool quick, int64_t* cases);

}  // namespace qalora_test
