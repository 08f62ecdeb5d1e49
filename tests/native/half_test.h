// half.h, and how the levels widen and narrow.
#pragma once

#include <cstdint>

namespace qalora_test {

// False, and the first difference printed, where a conversion is wrong. `quick` takes fewer random
// floats; all halves are always tried.
bool TestHalf(bool quick, int64_t* checks);

}  // namespace qalora_test
