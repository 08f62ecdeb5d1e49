#include "op.h"

#include <cstdio>
#include <cstring>
#include <new>

#include "dispatch.h"
#include "linear.h"
#include "ort_read.h"

namespace qalora {
namespace {

using ort::Api;
using ort::Status;

constexpr char kName[] = "GroupQuantLinear";

// A kernel of one node.
struct Kernel {
  const Api* api = nullptr;
  Linear linear;
};

// The attribute `compute`, "" where absent. An attribute of that name and another type is an error:
// the runtime reports it like an absent one, so the other types are asked for too.
Status* ReadCompute(const Api* api, const ort::KernelInfo* info, char* out, size_t room) {
  size_t size = 0;
  out[0] = '\0';
  const char* problem = nullptr;
  if (Failed(api, api->KernelInfoGetAttribute_string(info, "compute", nullptr, &size))) {
    int64_t integer;
    float real;
    const bool other = !Failed(api, api->KernelInfoGetAttribute_int64(info, "compute", &integer)) ||
                       !Failed(api, api->KernelInfoGetAttribute_float(info, "compute", &real));
    if (!other) return nullptr;
    problem = "is a number";
  } else if (size > room) {
    problem = "is a longer text";
  } else if (Failed(api, api->KernelInfoGetAttribute_string(info, "compute", out, &size))) {
    problem = "cannot be read";
  } else if (size < 2) {
    problem = "is empty";
  }
  if (!problem) return nullptr;
  Error error;
  std::snprintf(error.text, sizeof error.text,
                "GroupQuantLinear: attribute compute %s, expected \"fp32\", \"int16\" or \"int8\"",
                problem);
  return ToStatus(api, error);
}

// What the model states about the inputs before it runs; unknown parts stay kUnknown.
void ReadStaticInputs(const Api* api, const ort::KernelInfo* info,
                      const GroupQuantLinearOp& op, TensorInfo (&inputs)[kInputs]) {
  const Type x = FromOrt(op.x_type), parameter = FromOrt(op.parameter_type);
  const Type types[kInputs] = {x, Type::kUint8, parameter, parameter, x};
  size_t count = 0;
  if (Failed(api, api->KernelInfo_GetInputCount(info, &count))) count = 0;
  for (size_t i = 0; i < kInputs; ++i) {
    inputs[i].present = i < 4;
    inputs[i].type = types[i];
    ort::TypeInfo* type = nullptr;
    if (i >= count || Failed(api, api->KernelInfo_GetInputTypeInfo(info, i, &type))) continue;
    const ort::TensorShapeInfo* tensor = nullptr;
    TensorInfo known;
    if (type && !Failed(api, api->CastTypeInfoToTensorInfo(type, &tensor)) && tensor &&
        ReadTensorInfo(api, tensor, &known)) {
      // Rank 0 is how an unknown shape looks here; a true scalar is refused when it runs.
      if (known.rank == 0) known.rank = kUnknown;
      inputs[i] = known;
    }
    if (type) api->ReleaseTypeInfo(type);
  }
}

Status* QALORA_CALL CreateKernel(const ort::CustomOp* base, const Api* api,
                                 const ort::KernelInfo* info, void** out) noexcept {
  const auto& op = *static_cast<const GroupQuantLinearOp*>(base);
  Attributes attributes;
  char compute[16];
  if (Status* status = RequiredInt(api, info, kName, "K", &attributes.k)) return status;
  if (Status* status = RequiredInt(api, info, kName, "N", &attributes.n)) return status;
  if (Status* status = RequiredInt(api, info, kName, "bits", &attributes.bits)) return status;
  int64_t* group_size = &attributes.group_size;
  if (Status* status = RequiredInt(api, info, kName, "group_size", group_size)) return status;
  if (Status* status = ReadCompute(api, info, compute, sizeof compute)) return status;
  if (compute[0]) attributes.compute = compute;

  Layer layer;
  Error error;
  if (!CheckAttributes(attributes, &layer, &error)) return ToStatus(api, error);
  TensorInfo inputs[kInputs];
  ReadStaticInputs(api, info, op, inputs);
  if (!CheckInputs(layer, inputs, &error)) return ToStatus(api, error);
  const KernelSet* kernels = ChooseKernels(&error);
  if (!kernels) return ToStatus(api, error);
  Kernel* kernel = new (std::nothrow) Kernel;
  if (!kernel) return api->CreateStatus(ort::kFail, "GroupQuantLinear: not enough memory");
  kernel->linear.Init(layer, kernels);
  kernel->api = api;
  *out = kernel;
  return nullptr;
}

void QALORA_CALL DestroyKernel(void* kernel) noexcept { delete static_cast<Kernel*>(kernel); }

Status* QALORA_CALL Compute(void* self, ort::KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  const Api* api = kernel.api;
  const Layer& layer = kernel.linear.layer();
  CallInputs<kInputs> inputs;
  if (Status* status = inputs.Read(api, context, kName)) return status;
  Error error;
  int64_t rows = 0;
  if (!CheckInputs(layer, inputs.info, &error) || !CountRows(inputs.info[0], &rows, &error)) {
    return ToStatus(api, error);
  }
  int64_t dims[kMaxRank];
  const size_t rank = static_cast<size_t>(inputs.info[0].rank);
  std::memcpy(dims, inputs.info[0].dims, rank * sizeof(int64_t));
  dims[rank - 1] = layer.n;
  ort::Value* output = nullptr;
  if (Status* status = api->KernelContext_GetOutput(context, 0, dims, rank, &output)) return status;

  Tensors tensors;
  if (Status* status = api->GetTensorMutableData(output, &tensors.y)) return status;
  tensors.x = inputs.data[0];
  tensors.codes = static_cast<const uint8_t*>(inputs.data[1]);
  tensors.scale = inputs.data[2];
  tensors.zero_point = inputs.data[3];
  tensors.bias = inputs.data[4];
  tensors.half_x = inputs.info[0].type == Type::kFloat16;
  tensors.half_parameters = inputs.info[2].type == Type::kFloat16;
  Pool pool{api, context};
  const Parallel parallel{&pool, Pool::Run};
  if (!kernel.linear.Run(tensors, rows, parallel, &error)) {
    return api->CreateStatus(ort::kFail, error.text);
  }
  return nullptr;
}

// The output's shape: that of x with N last. Says nothing where x has an unknown rank or a dimension
// without value and name, which the interface cannot pass on. The type is read from x and not from
// the operator struct: the runtime calls the function of the first variant for all of them.
void InferShape(const Api* api, ort::InferContext* context) {
  ort::ElementType type = ort::kUndefined;
  const ort::OpAttribute* attribute = nullptr;
  ort::TensorShapeInfo* x = nullptr;
  int64_t n = 0;
  size_t size = 0, rank = 0;
  if (Failed(api, api->ShapeInferContext_GetAttribute(context, "N", &attribute)) ||
      Failed(api, api->ReadOpAttr(attribute, ort::kIntAttribute, &n, sizeof n, &size)) || n < 1 ||
      Failed(api, api->ShapeInferContext_GetInputTypeShape(context, 0, &x)) ||
      Failed(api, api->GetTensorElementType(x, &type)) ||
      Failed(api, api->GetDimensionsCount(x, &rank)) || rank < 1 || rank > kMaxRank) {
    return;
  }
  int64_t dims[kMaxRank];
  const char* names[kMaxRank] = {};
  if (Failed(api, api->GetDimensions(x, dims, rank)) ||
      Failed(api, api->GetSymbolicDimensions(x, names, rank))) {
    return;
  }
  dims[rank - 1] = n;
  names[rank - 1] = "";
  for (size_t i = 0; i < rank; ++i) {
    if (!names[i]) names[i] = "";
    if (dims[i] < 0 && !names[i][0]) return;
  }
  ort::TensorShapeInfo* y = nullptr;
  if (Failed(api, api->CreateTensorTypeAndShapeInfo(&y))) return;
  // A failure at any point leaves the shape unknown, which is no error.
  if (!Failed(api, api->SetTensorElementType(y, type)) &&
      !Failed(api, api->SetDimensions(y, dims, rank)) &&
      !Failed(api, api->SetSymbolicDimensions(y, names, rank))) {
    Failed(api, api->ShapeInferContext_SetOutputTypeShape(context, 0, y));
  }
  api->ReleaseTensorTypeAndShapeInfo(y);
}

// The runtime drops the status of this function, so it never returns one: wrong attributes are
// reported when the kernel is created.
Status* QALORA_CALL InferOutputShape(const ort::CustomOp* op, ort::InferContext* context) noexcept {
  InferShape(static_cast<const GroupQuantLinearOp*>(op)->api, context);
  return nullptr;
}

ort::ElementType QALORA_CALL InputType(const ort::CustomOp* base, size_t index) noexcept {
  const auto& op = *static_cast<const GroupQuantLinearOp*>(base);
  if (index == 1) return ort::kByte;
  return index == 2 || index == 3 ? op.parameter_type : op.x_type;
}

}  // namespace

bool CanInferShapes(const char* release) {
  int major = 0, minor = 0;
  if (!release || std::sscanf(release, "%d.%d", &major, &minor) != 2) return false;
  return major > 1 || minor >= 24;
}

void MakeOp(int variant, const Api* api, bool infer_shapes, GroupQuantLinearOp* op) {
  using ort::CustomOp;
  *op = GroupQuantLinearOp{};
  op->version = ort::kApiVersion;
  op->api = api;
  op->x_type = variant & 1 ? ort::kHalf : ort::kFloat;
  op->parameter_type = variant & 2 ? ort::kHalf : ort::kFloat;
  op->GetName = [](const CustomOp*) -> const char* { return kName; };
  op->GetExecutionProviderType = [](const CustomOp*) { return "CPUExecutionProvider"; };
  op->GetInputType = InputType;
  op->GetInputTypeCount = [](const CustomOp*) -> size_t { return kInputs; };
  op->GetOutputType = [](const CustomOp* base, size_t) {
    return static_cast<const GroupQuantLinearOp*>(base)->x_type;
  };
  op->GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  op->KernelDestroy = DestroyKernel;
  op->GetInputCharacteristic = [](const CustomOp*, size_t index) {
    return index == 4 ? ort::kOptional : ort::kRequired;
  };
  op->GetOutputCharacteristic = [](const CustomOp*, size_t) { return ort::kRequired; };
  op->GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  // No input or output is variadic; some releases ask all the same.
  op->GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
  op->GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
  op->GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  op->GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
  op->CreateKernelV2 = CreateKernel;
  op->KernelComputeV2 = Compute;
  if (infer_shapes) op->InferOutputShapeFn = InferOutputShape;
  op->GetStartVersion = [](const CustomOp*) { return 1; };
  op->GetEndVersion = [](const CustomOp*) { return 0x7fffffff; };
}

}  // namespace qalora
