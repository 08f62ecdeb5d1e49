// What the tests share: random numbers, memory of an exact size, ways to run tasks.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace qalora_test {

// xorshift64*: the same numbers on every machine.
class Rng {
 public:
  explicit Rng(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull) {
    if (!state_) state_ = 1;
    for (int i = 0; i < 8; ++i) Next();
  }
  uint64_t Next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1dull;
  }
  // 0 to count - 1.
  int64_t Below(int64_t count) {
    return static_cast<int64_t>((Next() >> 11) % static_cast<uint64_t>(count));
  }
  int64_t Between(int64_t low, int64_t high) { return low + Below(high - low + 1); }
  bool OneIn(int64_t count) { return Below(count) == 0; }
  // Evenly in [-1, 1).
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-52 - 1.0; }
  template <class T, size_t count>
  const T& Pick(const T (&list)[count]) {
    return list[Below(count)];
  }

 private:
  uint64_t state_;
};

// Bytes that end where the allocation ends, `offset` bytes behind its start: AddressSanitizer sees
// the first byte past them, and an offset of one element is an alignment no vector has.
class Exact {
 public:
  Exact(const void* from, size_t bytes, size_t offset)
      : memory_(static_cast<uint8_t*>(std::malloc(bytes + offset))),
        offset_(offset),
        bytes_(bytes) {
    if (!memory_) std::abort();
    if (from && bytes) std::memcpy(data(), from, bytes);
  }
  explicit Exact(size_t bytes) : Exact(nullptr, bytes, 0) {}
  ~Exact() { std::free(memory_); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  uint8_t* data() const { return memory_ + offset_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* memory_;
  size_t offset_, bytes_;
};

using Task = void (*)(void* data, size_t index);

// Runners with the signature that Parallel has.
inline bool RunSerial(void*, Task fn, size_t count, void* data) {
  for (size_t i = 0; i < count; ++i) fn(data, i);
  return true;
}

// Three threads that take one task at a time. They are new each time, so the library's memory of a
// thread has just the size it asked for, and nothing hides behind what an earlier call left.
inline bool RunThreads(void*, Task fn, size_t count, void* data) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (size_t i = next++; i < count; i = next++) fn(data, i);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return true;
}

}  // namespace qalora_test
