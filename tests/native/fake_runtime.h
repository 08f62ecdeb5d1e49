// As much of ONNX Runtime as ort_abi.h declares, in memory, with faults on demand.
//
// It hands out statuses and descriptions like the real one and counts them, so that a test can tell
// that each came back.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace qalora::ort {

// The opaque types of the interface, as this runtime has them.
struct Status {
  std::string text;
};
struct SessionOptions {
  Domain* domain = nullptr;
};
struct Domain {
  std::vector<const CustomOp*> ops;
};
struct TensorShapeInfo {
  ElementType type = kUndefined;
  std::vector<int64_t> dims;
  std::vector<std::string> names;
};
struct TypeInfo {
  TensorShapeInfo tensor;
  bool is_tensor = true;
};
struct Value {
  TensorShapeInfo info;
  uint8_t* data = nullptr;
};
struct OpAttribute {
  enum Kind { kInt, kFloat, kText } kind = kInt;
  int64_t integer = 0;
  float real = 0;
  std::string text;
};
struct KernelInfo {
  std::map<std::string, OpAttribute> attributes;
  std::vector<std::unique_ptr<TypeInfo>> inputs;  // null where absent
};
struct KernelContext {
  std::vector<std::unique_ptr<Value>> inputs;  // null where absent
  Value output;
  std::vector<uint8_t> memory;  // of the output, at its exact size
};
struct InferContext {
  const KernelInfo* node = nullptr;
  TensorShapeInfo output;
  bool stated = false;
};

}  // namespace qalora::ort

namespace qalora_test {

// What is alive of what the runtime has handed out.
int64_t Alive();

// The call, counted from now, that fails instead of doing its work; -1 for none.
void FailCall(int64_t number);

const qalora::ort::ApiBase* Runtime(const char* version);
void Release(qalora::ort::Status* status);

}  // namespace qalora_test

extern "C" qalora::ort::Status* RegisterCustomOps(qalora::ort::SessionOptions* options,
                                                  const qalora::ort::ApiBase* base);
