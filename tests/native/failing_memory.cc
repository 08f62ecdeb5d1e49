#include "failing_memory.h"

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <new>

namespace qalora_test {
namespace {

constexpr size_t kLargest = size_t{8} << 20;

int64_t until_failure = -1;
std::atomic<int64_t> asked_for{0};
thread_local int safe = 0;

bool Fails(size_t bytes) {
  if (safe) return false;
  asked_for += static_cast<int64_t>(bytes);
  return bytes > kLargest || (until_failure >= 0 && until_failure-- == 0);
}

}  // namespace

void FailAllocation(int64_t number) { until_failure = number; }

int64_t TakeAskedFor() { return asked_for.exchange(0); }

SafeMemory::SafeMemory() { ++safe; }
SafeMemory::~SafeMemory() { --safe; }

}  // namespace qalora_test

// The names that --wrap gives to the function that is called instead, and to the real one.
extern "C" {
void* __real_malloc(size_t bytes);
int __real_posix_memalign(void** out, size_t alignment, size_t bytes);
void* __real__ZnwmRKSt9nothrow_t(size_t bytes, const std::nothrow_t& tag);

void* __wrap_malloc(size_t bytes) {
  return qalora_test::Fails(bytes) ? nullptr : __real_malloc(bytes);
}

int __wrap_posix_memalign(void** out, size_t alignment, size_t bytes) {
  return qalora_test::Fails(bytes) ? ENOMEM : __real_posix_memalign(out, alignment, bytes);
}

void* __wrap__ZnwmRKSt9nothrow_t(size_t bytes, const std::nothrow_t& tag) {
  return qalora_test::Fails(bytes) ? nullptr : __real__ZnwmRKSt9nothrow_t(bytes, tag);
}
}
