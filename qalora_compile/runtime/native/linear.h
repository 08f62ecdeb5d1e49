// y = x Wᵀ + b for one checked layer: workspace, blocks of rows, division into tasks.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "kernels.h"

namespace qalora {

// Runs fn(data, 0) ... fn(data, count - 1), in any order and on any threads, and returns when all
// are done.
struct Parallel {
  void* context = nullptr;
  bool (*run)(void* context, void (*fn)(void* data, size_t index), size_t count, void* data) =
      nullptr;
};

// The tensors of one call, of the shapes that CheckInputs has seen.
struct Tensors {
  const void* x = nullptr;  // [rows, K]
  const uint8_t* codes = nullptr;
  const void* scale = nullptr;
  const void* zero_point = nullptr;
  const void* bias = nullptr;  // may be null
  void* y = nullptr;           // [rows, N], type of x
  bool half_x = false;         // x, bias and y are float16
  bool half_parameters = false;
};

// A layer bound to a level: any number of threads may call Run at once, after Init.
//
// Init allocates nothing: attributes and stated shapes cost a model file a few bytes, whatever they
// say. What grows with K is made in the first call, when tensors of that size are there.
class Linear {
 public:
  Linear() = default;
  ~Linear();
  Linear(const Linear&) = delete;
  Linear& operator=(const Linear&) = delete;

  void Init(const Layer& layer, const KernelSet* kernels);

  // False with `error` filled where memory is short or the runner fails.
  bool Run(const Tensors& tensors, int64_t rows, const Parallel& parallel, Error* error) const;

  const Layer& layer() const { return layer_; }
  const KernelSet& kernels() const { return *kernels_; }

 private:
  Layer layer_;
  const KernelSet* kernels_ = nullptr;
  Plan plan_;
  bool MakeMaps() const;
  void CountRun(const Tensors& tensors) const;

  mutable std::atomic<int> few_runs_{0};  // up to the one that moves the weights into large pages
  mutable std::mutex making_;
  mutable std::atomic<bool> made_{false};
  mutable int32_t* memory_ = nullptr;  // of what follows
  mutable LaneMap blocks_;
  mutable const int32_t* step_blocks_ = nullptr;
};

}  // namespace qalora
