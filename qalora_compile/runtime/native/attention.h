// What a CachedAttention node says about itself, checked, and the division of a call into tasks.
//
// Plain C++ without ONNX Runtime, as layer.h.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "linear.h"

namespace qalora {

constexpr int kAttentionInputs = 6;  // q, k, v, mask, past_key, past_value

struct AttentionAttributes {
  int64_t heads = 0;
  int64_t kv_heads = 0;
  float scale = 1.0f;
};

// Check the attributes; false with `error` filled where one is illegal.
bool CheckAttention(const AttentionAttributes& attributes, Error* error);

// Check types and shapes of a call, all of them known, and fill `shape`; false with `error` filled
// where one does not fit.
bool CheckAttentionInputs(const AttentionAttributes& attributes,
                          const TensorInfo (&inputs)[kAttentionInputs], AttentionShape* shape,
                          Error* error);

// Compute y and the present keys and values; false with `error` filled where memory is short or the
// runner fails.
bool RunAttention(const AttentionJob& job, const KernelSet& kernels, const Parallel& parallel,
                  Error* error);

}  // namespace qalora
