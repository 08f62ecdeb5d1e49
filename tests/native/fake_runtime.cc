#include "fake_runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "failing_memory.h"

namespace qalora_test {

const char* const kInjected = "injected fault";
const char* const kTooLarge = "the output is too large";

namespace {

using namespace qalora::ort;

int64_t alive = 0;
int64_t until_fault = -1;
const char* release = "1.32.0";
uint32_t newest_table = 18;

Status* Make(const char* text) {
  const SafeMemory safe;
  ++alive;
  return new Status{text};
}

// A status where this call is the one to fail.
Status* Fault() { return until_fault >= 0 && until_fault-- == 0 ? Make(kInjected) : nullptr; }

// Stands first in each function that can fail.
#define FAULT_POINT()    \
  const SafeMemory safe; \
  if (Status* fault = Fault()) return fault

Status* CreateStatus(ErrorCode, const char* message) { return Make(message); }

Status* CreateDomain(const char*, Domain** out) {
  FAULT_POINT();
  *out = new Domain;
  return nullptr;
}

Status* AddOp(Domain* domain, const CustomOp* op) {
  FAULT_POINT();
  domain->ops.push_back(op);
  return nullptr;
}

Status* AddDomain(SessionOptions* options, Domain* domain) {
  FAULT_POINT();
  options->domain = domain;
  return nullptr;
}

Status* GetData(Value* value, void** out) {
  FAULT_POINT();
  *out = value->data;
  return nullptr;
}

Status* CastType(const TypeInfo* type, const TensorShapeInfo** out) {
  FAULT_POINT();
  *out = type->is_tensor ? &type->tensor : nullptr;
  return nullptr;
}

Status* CreateInfo(TensorShapeInfo** out) {
  FAULT_POINT();
  ++alive;
  *out = new TensorShapeInfo;
  (*out)->owned = true;
  return nullptr;
}

Status* SetType(TensorShapeInfo* info, ElementType type) {
  FAULT_POINT();
  info->type = type;
  return nullptr;
}

Status* SetDims(TensorShapeInfo* info, const int64_t* dims, size_t count) {
  FAULT_POINT();
  info->dims.assign(dims, dims + count);
  return nullptr;
}

Status* GetType(const TensorShapeInfo* info, ElementType* out) {
  FAULT_POINT();
  *out = info->type;
  return nullptr;
}

Status* GetRank(const TensorShapeInfo* info, size_t* out) {
  FAULT_POINT();
  *out = info->dims.size();
  return nullptr;
}

Status* GetDims(const TensorShapeInfo* info, int64_t* dims, size_t count) {
  FAULT_POINT();
  for (size_t i = 0; i < count && i < info->dims.size(); ++i) dims[i] = info->dims[i];
  return nullptr;
}

Status* GetNames(const TensorShapeInfo* info, const char** names, size_t count) {
  FAULT_POINT();
  for (size_t i = 0; i < count; ++i) {
    names[i] = i < info->names.size() ? info->names[i].c_str() : "";
  }
  return nullptr;
}

Status* GetTensorInfo(const Value* value, TensorShapeInfo** out) {
  FAULT_POINT();
  ++alive;
  *out = new TensorShapeInfo(value->info);
  (*out)->owned = true;
  return nullptr;
}

const OpAttribute* Find(const KernelInfo* info, const char* name, OpAttribute::Kind kind) {
  const auto found = info->attributes.find(name);
  return found == info->attributes.end() || found->second.kind != kind ? nullptr : &found->second;
}

Status* GetFloat(const KernelInfo* info, const char* name, float* out) {
  FAULT_POINT();
  const OpAttribute* attribute = Find(info, name, OpAttribute::kFloat);
  if (!attribute) return Make("no such attribute");
  *out = attribute->real;
  return nullptr;
}

Status* GetInt(const KernelInfo* info, const char* name, int64_t* out) {
  FAULT_POINT();
  const OpAttribute* attribute = Find(info, name, OpAttribute::kInt);
  if (!attribute) return Make("no such attribute");
  *out = attribute->integer;
  return nullptr;
}

Status* GetText(const KernelInfo* info, const char* name, char* out, size_t* size) {
  FAULT_POINT();
  const OpAttribute* attribute = Find(info, name, OpAttribute::kText);
  if (!attribute) return Make("no such attribute");
  const size_t needed = attribute->text.size() + 1;
  if (out && *size < needed) return Make("the buffer is too small");
  if (out) std::memcpy(out, attribute->text.c_str(), needed);
  *size = needed;
  return nullptr;
}

Status* GetInputCount(const KernelContext* context, size_t* out) {
  FAULT_POINT();
  *out = context->inputs.size();
  return nullptr;
}

Status* GetInput(const KernelContext* context, size_t index, const Value** out) {
  FAULT_POINT();
  if (index >= context->inputs.size()) return Make("no such input");
  *out = context->inputs[index].get();
  return nullptr;
}

// Bytes of a tensor; more than `most` where it has more, or a negative dimension.
int64_t CountBytes(ElementType type, const int64_t* dims, size_t count, int64_t most) {
  int64_t bytes = type == kHalf ? 2 : 4;
  for (size_t i = 0; i < count; ++i) {
    if (dims[i] == 0) return 0;
  }
  for (size_t i = 0; i < count; ++i) {
    if (dims[i] < 0 || dims[i] > most / bytes) return most + 1;
    bytes *= dims[i];
  }
  return bytes;
}

Status* GetOutput(KernelContext* context, size_t index, const int64_t* dims, size_t count,
                  Value** out) {
  FAULT_POINT();
  constexpr int64_t kMost = 1 << 20;
  if (index >= 3) return Make("no such output");
  const ElementType type = context->inputs[0]->info.type;
  const int64_t bytes = CountBytes(type, dims, count, kMost);
  if (bytes > kMost) return Make(kTooLarge);
  auto& memory = context->memory[index];
  Value& value = context->outputs[index];
  value.info = {type, {dims, dims + count}, {}};
  if (index && context->shares) {
    value.data = context->inputs[index + 3]->data;
  } else {
    memory = std::make_unique<Exact>(static_cast<size_t>(bytes));
    // 0x7fff and 0x7fff7fff are NaNs.
    for (int64_t i = 0; i < bytes; ++i) memory->data()[i] = i % 2 ? 0x7f : 0xff;
    value.data = memory->data();
  }
  *out = &value;
  return nullptr;
}

void ReleaseStatus(Status* status) { Release(status); }

void ReleaseType(TypeInfo* type) {
  --alive;
  delete type;
}

void ReleaseInfo(TensorShapeInfo* info) {
  if (!info->owned) {
    std::printf("FAILED: a description was released that belongs to the runtime\n");
    std::abort();
  }
  --alive;
  delete info;
}

Status* InfoInputCount(const KernelInfo* info, size_t* out) {
  FAULT_POINT();
  *out = info->inputs.size();
  return nullptr;
}

Status* InfoInputType(const KernelInfo* info, size_t index, TypeInfo** out) {
  FAULT_POINT();
  if (index >= info->inputs.size() || !info->inputs[index]) return Make("no such input");
  ++alive;
  *out = new TypeInfo(*info->inputs[index]);
  return nullptr;
}

Status* InferInput(const InferContext* context, size_t index, TensorShapeInfo** out) {
  FAULT_POINT();
  const auto& inputs = context->node->inputs;
  if (index >= inputs.size() || !inputs[index]) return Make("no such input");
  if (!inputs[index]->is_tensor) return Make("no tensor");
  *out = &inputs[index]->tensor;  // owned by the context
  return nullptr;
}

Status* InferAttribute(const InferContext* context, const char* name, const OpAttribute** out) {
  FAULT_POINT();
  const auto found = context->node->attributes.find(name);
  if (found == context->node->attributes.end()) return Make("no such attribute");
  *out = &found->second;
  return nullptr;
}

Status* InferOutput(const InferContext* context, size_t, const TensorShapeInfo* info) {
  FAULT_POINT();
  auto* self = const_cast<InferContext*>(context);
  self->output = *info;
  self->stated = true;
  return nullptr;
}

Status* SetNames(TensorShapeInfo* info, const char* names[], size_t count) {
  FAULT_POINT();
  if (count != info->dims.size()) return Make("as many names as dimensions");
  info->names.assign(names, names + count);
  return nullptr;
}

Status* ReadAttribute(const OpAttribute* attribute, AttributeKind, void* data, size_t size,
                      size_t* out) {
  FAULT_POINT();
  if (attribute->kind != OpAttribute::kInt) return Make("another type");
  *out = sizeof attribute->integer;
  if (size < *out) return Make("the buffer is too small");
  std::memcpy(data, &attribute->integer, *out);
  return nullptr;
}

void RunTasks(void (*fn)(void*, size_t), size_t total, void* data) {
  for (size_t i = total; i-- > 0;) fn(data, i);  // any order is allowed
}

Status* ParallelFor(const KernelContext* context, void (*fn)(void*, size_t), size_t total, size_t,
                    void* data) {
  if (Status* fault = Fault()) return fault;
  if (!context->threads) {
    RunTasks(fn, total, data);
    return nullptr;
  }
  const SafeMemory safe;
  std::thread(RunTasks, fn, total, data).join();
  return nullptr;
}

Api MakeApi() {
  Api api{};
  api.CreateStatus = CreateStatus;
  api.CreateCustomOpDomain = CreateDomain;
  api.CustomOpDomain_Add = AddOp;
  api.AddCustomOpDomain = AddDomain;
  api.GetTensorMutableData = GetData;
  api.CastTypeInfoToTensorInfo = CastType;
  api.CreateTensorTypeAndShapeInfo = CreateInfo;
  api.SetTensorElementType = SetType;
  api.SetDimensions = SetDims;
  api.GetTensorElementType = GetType;
  api.GetDimensionsCount = GetRank;
  api.GetDimensions = GetDims;
  api.GetSymbolicDimensions = GetNames;
  api.GetTensorTypeAndShape = GetTensorInfo;
  api.KernelInfoGetAttribute_float = GetFloat;
  api.KernelInfoGetAttribute_int64 = GetInt;
  api.KernelInfoGetAttribute_string = GetText;
  api.KernelContext_GetInputCount = GetInputCount;
  api.KernelContext_GetInput = GetInput;
  api.KernelContext_GetOutput = GetOutput;
  api.ReleaseStatus = ReleaseStatus;
  api.ReleaseTypeInfo = ReleaseType;
  api.ReleaseTensorTypeAndShapeInfo = ReleaseInfo;
  api.KernelInfo_GetInputCount = InfoInputCount;
  api.KernelInfo_GetInputTypeInfo = InfoInputType;
  api.ShapeInferContext_GetInputTypeShape = InferInput;
  api.ShapeInferContext_GetAttribute = InferAttribute;
  api.ShapeInferContext_SetOutputTypeShape = InferOutput;
  api.SetSymbolicDimensions = SetNames;
  api.ReadOpAttr = ReadAttribute;
  api.KernelContext_ParallelFor = ParallelFor;
  return api;
}

const Api api = MakeApi();
const Api* GetApi(uint32_t version) { return version <= newest_table ? &api : nullptr; }
const char* GetVersion() { return release; }
const ApiBase base{GetApi, GetVersion};

}  // namespace

int64_t Alive() { return alive; }
void FailCall(int64_t number) { until_fault = number; }

const ApiBase* Runtime(const char* version, uint32_t newest) {
  release = version;
  newest_table = newest;
  return &base;
}

void Release(Status* status) {
  if (!status) return;
  --alive;
  delete status;
}

}  // namespace qalora_test
