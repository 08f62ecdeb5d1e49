// As much of ONNX Runtime as ort_abi.h declares, in memory, with faults on demand.
//
// It hands out statuses and descriptions like the real one and counts them, so that a test can tell
// that each came back; one that is not the library's to release ends the program.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "support.h"

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
  bool owned = false;  // by the library, which has to release it
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
  // By number; NaNs until something is written.
  Value outputs[3];
  std::unique_ptr<qalora_test::Exact> memory[3];
  bool shares = false;  // outputs 1 and 2 are inputs 4 and 5, as caches are
  bool threads = false;  // whether tasks run on other threads than the call
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

// Texts of the statuses that the library may pass on.
extern const char* const kInjected;
extern const char* const kTooLarge;  // for an output of more than 1 MiB

// A runtime of that release, whose table has versions up to `newest`.
const qalora::ort::ApiBase* Runtime(const char* version, uint32_t newest = 18);
void Release(qalora::ort::Status* status);

}  // namespace qalora_test

extern "C" qalora::ort::Status* RegisterCustomOps(qalora::ort::SessionOptions* options,
                                                  const qalora::ort::ApiBase* base);
