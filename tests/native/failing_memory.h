// Memory that runs out on demand.
//
// The linker sends the library's calls of malloc, posix_memalign and the new that does not throw
// here (--wrap), so that a test can make any of them fail, and large ones always do: a wrong
// dimension that gets as far as an allocation costs nothing.
#pragma once

#include <cstdint>

namespace qalora_test {

// The allocation, counted from now, that fails; -1 for none.
void FailAllocation(int64_t number);

// Bytes asked for since the last call, by all threads, whether they were given or not.
int64_t TakeAskedFor();

// While one lives, this thread's allocations do not fail: those of the fake runtime itself, which a
// static link sends here too.
class SafeMemory {
 public:
  SafeMemory();
  ~SafeMemory();
};

}  // namespace qalora_test
