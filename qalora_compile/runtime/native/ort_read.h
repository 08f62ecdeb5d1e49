// What the operators read from ONNX Runtime in the same way: types, shapes, attributes, inputs.
#pragma once

#include <cstdio>

#include "layer.h"
#include "linear.h"
#include "ort_abi.h"

namespace qalora {

inline ort::Status* ToStatus(const ort::Api* api, const Error& error) {
  return api->CreateStatus(ort::kInvalidArgument, error.text);
}

// Releases a status and says whether there was one.
inline bool Failed(const ort::Api* api, ort::Status* status) {
  if (!status) return false;
  api->ReleaseStatus(status);
  return true;
}

inline Type FromOrt(ort::ElementType type) {
  switch (type) {
    case ort::kFloat: return Type::kFloat32;
    case ort::kHalf: return Type::kFloat16;
    case ort::kByte: return Type::kUint8;
    case ort::kBool: return Type::kBool;
    default: return Type::kOther;
  }
}

// Reads type and dimensions. An input with more than kMaxRank dimensions keeps its rank, so that the
// checks refuse it, and no dimensions.
inline bool ReadTensorInfo(const ort::Api* api, const ort::TensorShapeInfo* info, TensorInfo* out) {
  ort::ElementType type = ort::kUndefined;
  size_t rank = 0;
  if (Failed(api, api->GetTensorElementType(info, &type)) ||
      Failed(api, api->GetDimensionsCount(info, &rank))) {
    return false;
  }
  out->present = true;
  out->type = FromOrt(type);
  out->rank = static_cast<int64_t>(rank);
  return rank > kMaxRank || !Failed(api, api->GetDimensions(info, out->dims, rank));
}

// An integer attribute of the operator `op`.
inline ort::Status* RequiredInt(const ort::Api* api, const ort::KernelInfo* info, const char* op,
                                const char* name, int64_t* out) {
  if (!Failed(api, api->KernelInfoGetAttribute_int64(info, name, out))) return nullptr;
  Error error;
  std::snprintf(error.text, sizeof error.text, "%s: attribute %s is missing or no integer", op,
                name);
  return ToStatus(api, error);
}

// The inputs of a call of the operator `op`: what its checks need, and the data.
template <int count>
struct CallInputs {
  TensorInfo info[count];
  void* data[count] = {};

  ort::Status* Read(const ort::Api* api, const ort::KernelContext* context, const char* op) {
    size_t given = 0;
    if (ort::Status* status = api->KernelContext_GetInputCount(context, &given)) return status;
    for (size_t i = 0; i < count && i < given; ++i) {
      const ort::Value* value = nullptr;
      if (ort::Status* status = api->KernelContext_GetInput(context, i, &value)) return status;
      if (!value) continue;
      ort::TensorShapeInfo* shape = nullptr;
      if (ort::Status* status = api->GetTensorTypeAndShape(value, &shape)) return status;
      const bool known = ReadTensorInfo(api, shape, &info[i]);
      api->ReleaseTensorTypeAndShapeInfo(shape);
      if (!known) {
        Error error;
        std::snprintf(error.text, sizeof error.text, "%s: an input has no shape", op);
        return api->CreateStatus(ort::kFail, error.text);
      }
      // Only a read: the interface has no other function for it.
      auto* readable = const_cast<ort::Value*>(value);
      if (ort::Status* status = api->GetTensorMutableData(readable, &data[i])) return status;
    }
    return nullptr;
  }
};

// The session's threads.
struct Pool {
  const ort::Api* api;
  const ort::KernelContext* context;
  static bool Run(void* self, void (*fn)(void*, size_t), size_t count, void* data) {
    const Pool& pool = *static_cast<const Pool*>(self);
    return !Failed(pool.api,
                   pool.api->KernelContext_ParallelFor(pool.context, fn, count, 0, data));
  }
};

}  // namespace qalora
