// Memory of one thread that is kept between calls.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace qalora {

constexpr size_t kAlignment = 64;
// Kept between calls on each thread; what is larger goes back at the end of the call.
constexpr size_t kKeptBytes = size_t{4} << 20;

// Memory of one thread, grown as needed. One buffer for a caller's workspace, one for a task's
// scratch: the thread that calls may run tasks too.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  void* Get(size_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    // Not aligned_alloc: Android has it only from API level 28 on.
    if (posix_memalign(&data_, kAlignment, bytes) != 0) return data_ = nullptr;
    size_ = bytes;
    return data_;
  }
  void Shrink() {
    if (size_ <= kKeptBytes) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace qalora
