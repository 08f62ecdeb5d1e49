// The operator qalora::GroupQuantLinear as ONNX Runtime sees it.
#pragma once

#include "ort_abi.h"

namespace qalora {

// One struct per combination of types: x (with bias and y) and scale (with zero_point), each float32
// or float16. The runtime joins structs of one name into one operator and picks by type.
constexpr int kOpVariants = 4;

struct GroupQuantLinearOp : ort::CustomOp {
  // Functions without a context need the table; set at registration, the same in each.
  const ort::Api* api = nullptr;
  ort::ElementType x_type = ort::kFloat;
  ort::ElementType parameter_type = ort::kFloat;
};

// Fill one variant, 0 to kOpVariants - 1. `infer_shapes` says whether the runtime may ask for shapes.
void MakeOp(int variant, const ort::Api* api, bool infer_shapes, GroupQuantLinearOp* op);

// Whether a release ("1.23.2") can ask a custom operator for shapes. Before 1.24 the runtime itself
// follows a null pointer when it does so for a node whose optional input is the empty name, so there
// shapes are left unknown.
bool CanInferShapes(const char* release);

}  // namespace qalora
