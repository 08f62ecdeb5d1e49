// The operator qalora::CachedAttention as ONNX Runtime sees it.
#pragma once

#include "ort_abi.h"

namespace qalora {

// One struct per type of the mask: bool and float32.
constexpr int kAttentionVariants = 2;

struct CachedAttentionOp : ort::CustomOp {
  ort::ElementType mask_type = ort::kBool;
};

// Fill one variant, 0 to kAttentionVariants - 1.
void MakeAttentionOp(int variant, CachedAttentionOp* op);

}  // namespace qalora
