// y = x Wᵀ + b for one checked layer: workspace, blocks of rows, division into tasks.
#pragma once

#include <cstddef>
#include <cstdint>

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

// A layer bound to a level. Immutable after Init: any number of threads may call Run at once.
class Linear {
 public:
  Linear() = default;
  ~Linear();
  Linear(const Linear&) = delete;
  Linear& operator=(const Linear&) = delete;

  // False where memory is short.
  bool Init(const Layer& layer, const KernelSet* kernels);

  // False with `error` filled where memory is short or the runner fails.
  bool Run(const Tensors& tensors, int64_t rows, const Parallel& parallel, Error* error) const;

  const Layer& layer() const { return layer_; }
  const KernelSet& kernels() const { return *kernels_; }

 private:
  Layer layer_;
  const KernelSet* kernels_ = nullptr;
  Plan plan_;
  bool MakeMap(int64_t vectors, int64_t lane_codes, LaneMap* map);

  int32_t* memory_[2] = {};  // of the two maps
  int maps_ = 0;
  LaneMap steps_;
  LaneMap blocks_;
};

}  // namespace qalora
