#include "attention_op.h"

#include <new>

#include "attention.h"
#include "dispatch.h"
#include "ort_read.h"

namespace qalora {
namespace {

using ort::Api;
using ort::Status;

constexpr char kName[] = "CachedAttention";
constexpr size_t kOutputs = 3;

struct Kernel {
  const Api* api = nullptr;
  const KernelSet* kernels = nullptr;
  AttentionAttributes attributes;
};

Status* QALORA_CALL CreateKernel(const ort::CustomOp*, const Api* api, const ort::KernelInfo* info,
                                 void** out) noexcept {
  AttentionAttributes attributes;
  int64_t* heads = &attributes.heads;
  int64_t* kv_heads = &attributes.kv_heads;
  if (Status* status = RequiredInt(api, info, kName, "q_num_heads", heads)) return status;
  if (Status* status = RequiredInt(api, info, kName, "kv_num_heads", kv_heads)) return status;
  Error error;
  if (Failed(api, api->KernelInfoGetAttribute_float(info, "scale", &attributes.scale))) {
    return api->CreateStatus(ort::kInvalidArgument,
                             "CachedAttention: attribute scale is missing or no real number");
  }
  if (!CheckAttention(attributes, &error)) return ToStatus(api, error);
  const KernelSet* kernels = ChooseKernels(&error);
  if (!kernels) return ToStatus(api, error);
  Kernel* kernel = new (std::nothrow) Kernel;
  if (!kernel) return api->CreateStatus(ort::kFail, "CachedAttention: not enough memory");
  kernel->api = api;
  kernel->kernels = kernels;
  kernel->attributes = attributes;
  *out = kernel;
  return nullptr;
}

void QALORA_CALL DestroyKernel(void* kernel) noexcept { delete static_cast<Kernel*>(kernel); }

Status* Output(const Api* api, ort::KernelContext* context, size_t index, const int64_t* dims,
               size_t rank, float** out) {
  ort::Value* value = nullptr;
  if (Status* status = api->KernelContext_GetOutput(context, index, dims, rank, &value)) {
    return status;
  }
  void* data = nullptr;
  if (Status* status = api->GetTensorMutableData(value, &data)) return status;
  *out = static_cast<float*>(data);
  return nullptr;
}

Status* Outputs(const Api* api, ort::KernelContext* context, AttentionJob* job) {
  const AttentionShape& shape = job->shape;
  const int64_t y[] = {shape.batch, shape.queries, shape.heads * shape.value_width};
  const int64_t key[] = {shape.batch, shape.kv_heads, shape.present_rows, shape.width};
  const int64_t value[] = {shape.batch, shape.kv_heads, shape.present_rows, shape.value_width};
  if (Status* status = Output(api, context, 0, y, 3, &job->y)) return status;
  if (Status* status = Output(api, context, 1, key, 4, &job->present_key)) return status;
  return Output(api, context, 2, value, 4, &job->present_value);
}

Status* QALORA_CALL Compute(void* self, ort::KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  const Api* api = kernel.api;
  CallInputs<kAttentionInputs> inputs;
  if (Status* status = inputs.Read(api, context, kName)) return status;
  Error error;
  AttentionJob job;
  job.scale = kernel.attributes.scale;
  if (!CheckAttentionInputs(kernel.attributes, inputs.info, &job.shape, &error)) {
    return ToStatus(api, error);
  }
  if (Status* status = Outputs(api, context, &job)) return status;
  const auto floats = [&](int index) { return static_cast<const float*>(inputs.data[index]); };
  job.q = floats(0);
  job.k = floats(1);
  job.v = floats(2);
  job.mask = inputs.data[3];
  job.past_key = floats(4);
  job.past_value = floats(5);
  Pool pool{api, context};
  const Parallel parallel{&pool, Pool::Run};
  if (!RunAttention(job, *kernel.kernels, parallel, &error)) {
    return api->CreateStatus(ort::kFail, error.text);
  }
  return nullptr;
}

ort::ElementType QALORA_CALL InputType(const ort::CustomOp* base, size_t index) noexcept {
  return index == 3 ? static_cast<const CachedAttentionOp*>(base)->mask_type : ort::kFloat;
}

}  // namespace

void MakeAttentionOp(int variant, CachedAttentionOp* op) {
  using ort::CustomOp;
  *op = CachedAttentionOp{};
  op->version = ort::kApiVersion;
  op->mask_type = variant ? ort::kFloat : ort::kBool;
  op->GetName = [](const CustomOp*) -> const char* { return kName; };
  op->GetExecutionProviderType = [](const CustomOp*) { return "CPUExecutionProvider"; };
  op->GetInputType = InputType;
  op->GetInputTypeCount = [](const CustomOp*) -> size_t { return kAttentionInputs; };
  op->GetOutputType = [](const CustomOp*, size_t) { return ort::kFloat; };
  op->GetOutputTypeCount = [](const CustomOp*) -> size_t { return kOutputs; };
  op->KernelDestroy = DestroyKernel;
  op->GetInputCharacteristic = [](const CustomOp*, size_t) { return ort::kRequired; };
  op->GetOutputCharacteristic = [](const CustomOp*, size_t) { return ort::kRequired; };
  op->GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  // As for GroupQuantLinear.
  op->GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
  op->GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
  op->GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  op->GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
  op->CreateKernelV2 = CreateKernel;
  op->KernelComputeV2 = Compute;
  op->GetStartVersion = [](const CustomOp*) { return 1; };
  op->GetEndVersion = [](const CustomOp*) { return 0x7fffffff; };
}

}  // namespace qalora
