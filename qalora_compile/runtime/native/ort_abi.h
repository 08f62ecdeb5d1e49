// The part of ONNX Runtime's C interface that a custom-operator library needs, written down here from
// its binary interface, so that the library builds without any file of ONNX Runtime.
//
// ONNX Runtime hands out a table of function pointers. The table only ever grows at its end, so a
// slot keeps its number for good; the first 275 slots exist in every release from 1.17 on. What is
// declared below are the slots this library calls, each at its number, and the struct by which a
// library describes an operator, word by word. The static assertions at the end pin all of them.
//
// Conventions of the interface: a function that can fail returns a status to be released by the
// caller, or null for success. Strings are UTF-8 and end with a zero byte.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define QALORA_CALL __stdcall
#else
#define QALORA_CALL
#endif

namespace qalora::ort {

// The table version to ask for: the lowest release this library supports is 1.18.
constexpr uint32_t kApiVersion = 18;

struct Status;
struct SessionOptions;
struct Domain;           // a set of custom operators under one name
struct Value;            // a tensor
struct TypeInfo;         // of any value
struct TensorShapeInfo;  // element type and dimensions of a tensor
struct KernelInfo;       // a node, while its kernel is created
struct KernelContext;    // a node, while it runs
struct InferContext;     // a node, while shapes are inferred
struct OpAttribute;      // an attribute of such a node

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// ONNX's numbers of tensor element types.
enum ElementType : int { kUndefined = 0, kFloat = 1, kByte = 2, kBool = 9, kHalf = 10 };

// Whether an input or output has to be there.
enum Presence : int { kRequired = 0, kOptional = 1 };

// Kind of value asked of ReadOpAttribute.
enum AttributeKind : int { kIntAttribute = 1 };

// A slot that this library does not call.
using Unused = void*;

struct Api {
  // 0: a new status with a message (copied).
  Status*(QALORA_CALL* CreateStatus)(ErrorCode code, const char* message);
  Unused unused_1[25];
  // 26: a new, empty domain.
  Status*(QALORA_CALL* CreateCustomOpDomain)(const char* name, Domain** out);
  // 27: adds an operator; the struct has to outlive the domain.
  Status*(QALORA_CALL* CustomOpDomain_Add)(Domain* domain, const struct CustomOp* op);
  // 28: makes the domain known to sessions with these options; it has to outlive them.
  Status*(QALORA_CALL* AddCustomOpDomain)(SessionOptions* options, Domain* domain);
  Unused unused_29[22];
  // 51: the elements of a tensor.
  Status*(QALORA_CALL* GetTensorMutableData)(Value* value, void** out);
  Unused unused_52[3];
  // 55: the tensor part of a type, null where the value is no tensor; owned by the type.
  Status*(QALORA_CALL* CastTypeInfoToTensorInfo)(const TypeInfo* type, const TensorShapeInfo** out);
  Unused unused_56[1];
  // 57: a new, empty description of a tensor.
  Status*(QALORA_CALL* CreateTensorTypeAndShapeInfo)(TensorShapeInfo** out);
  // 58
  Status*(QALORA_CALL* SetTensorElementType)(TensorShapeInfo* info, ElementType type);
  // 59
  Status*(QALORA_CALL* SetDimensions)(TensorShapeInfo* info, const int64_t* dims, size_t count);
  // 60
  Status*(QALORA_CALL* GetTensorElementType)(const TensorShapeInfo* info, ElementType* out);
  // 61: the rank.
  Status*(QALORA_CALL* GetDimensionsCount)(const TensorShapeInfo* info, size_t* out);
  // 62: dimensions, -1 where unknown.
  Status*(QALORA_CALL* GetDimensions)(const TensorShapeInfo* info, int64_t* dims, size_t count);
  // 63: names of dimensions, "" where a dimension has a value or no name; owned by `info`.
  Status*(QALORA_CALL* GetSymbolicDimensions)(const TensorShapeInfo* info, const char** names,
                                             size_t count);
  Unused unused_64[1];
  // 65: a new description of a tensor at hand.
  Status*(QALORA_CALL* GetTensorTypeAndShape)(const Value* value, TensorShapeInfo** out);
  Unused unused_66[19];
  // 85, 86, 87: an attribute of the node. The string goes to a buffer of *size bytes; without a
  // buffer only its size is returned, the final zero byte included.
  Status*(QALORA_CALL* KernelInfoGetAttribute_float)(const KernelInfo* info, const char* name,
                                                    float* out);
  Status*(QALORA_CALL* KernelInfoGetAttribute_int64)(const KernelInfo* info, const char* name,
                                                    int64_t* out);
  Status*(QALORA_CALL* KernelInfoGetAttribute_string)(const KernelInfo* info, const char* name,
                                                     char* out, size_t* size);
  // 88: inputs, absent optional ones in the middle included.
  Status*(QALORA_CALL* KernelContext_GetInputCount)(const KernelContext* context, size_t* out);
  Unused unused_89[1];
  // 90: null for an absent optional input.
  Status*(QALORA_CALL* KernelContext_GetInput)(const KernelContext* context, size_t index,
                                              const Value** out);
  // 91: allocates the output.
  Status*(QALORA_CALL* KernelContext_GetOutput)(KernelContext* context, size_t index,
                                               const int64_t* dims, size_t count, Value** out);
  Unused unused_92[1];
  // 93
  void(QALORA_CALL* ReleaseStatus)(Status* status);
  Unused unused_94[4];
  // 98
  void(QALORA_CALL* ReleaseTypeInfo)(TypeInfo* type);
  // 99
  void(QALORA_CALL* ReleaseTensorTypeAndShapeInfo)(TensorShapeInfo* info);
  Unused unused_100[130];
  // 230: inputs of the node.
  Status*(QALORA_CALL* KernelInfo_GetInputCount)(const KernelInfo* info, size_t* out);
  Unused unused_231[3];
  // 234: type of an input as far as the model states it, to be released.
  Status*(QALORA_CALL* KernelInfo_GetInputTypeInfo)(const KernelInfo* info, size_t index,
                                                   TypeInfo** out);
  Unused unused_235[33];
  // 268: type and shape of an input, owned by the context.
  Status*(QALORA_CALL* ShapeInferContext_GetInputTypeShape)(const InferContext* context,
                                                           size_t index, TensorShapeInfo** out);
  // 269: owned by the context.
  Status*(QALORA_CALL* ShapeInferContext_GetAttribute)(const InferContext* context,
                                                      const char* name, const OpAttribute** out);
  // 270: states the shape of an output.
  Status*(QALORA_CALL* ShapeInferContext_SetOutputTypeShape)(const InferContext* context,
                                                            size_t index,
                                                            const TensorShapeInfo* info);
  // 271: names of dimensions, "" for those with a value; as many as there are dimensions.
  Status*(QALORA_CALL* SetSymbolicDimensions)(TensorShapeInfo* info, const char* names[],
                                             size_t count);
  // 272
  Status*(QALORA_CALL* ReadOpAttr)(const OpAttribute* attribute, AttributeKind kind, void* data,
                                  size_t size, size_t* out);
  Unused unused_273[1];
  // 274: fn(data, 0) ... fn(data, total - 1) on the session's threads; `batches` 0 lets the pool
  // divide the work.
  Status*(QALORA_CALL* KernelContext_ParallelFor)(const KernelContext* context,
                                                 void (*fn)(void* data, size_t index),
                                                 size_t total, size_t batches, void* data);
};

// How the runtime hands over the table: RegisterCustomOps gets one of these.
struct ApiBase {
  const Api*(QALORA_CALL* GetApi)(uint32_t version);  // null where the release is older
  const char*(QALORA_CALL* GetVersionString)();
};

// An operator. Functions get the struct itself as `op`.
struct CustomOp {
  uint32_t version;      // 0: the table version the struct was written for
  Unused create_kernel;  // 1: of old releases, replaced by CreateKernelV2
  const char*(QALORA_CALL* GetName)(const CustomOp* op);
  const char*(QALORA_CALL* GetExecutionProviderType)(const CustomOp* op);
  ElementType(QALORA_CALL* GetInputType)(const CustomOp* op, size_t index);
  size_t(QALORA_CALL* GetInputTypeCount)(const CustomOp* op);
  ElementType(QALORA_CALL* GetOutputType)(const CustomOp* op, size_t index);
  size_t(QALORA_CALL* GetOutputTypeCount)(const CustomOp* op);
  Unused kernel_compute;  // 8: of old releases, replaced by KernelComputeV2
  void(QALORA_CALL* KernelDestroy)(void* kernel);
  Presence(QALORA_CALL* GetInputCharacteristic)(const CustomOp* op, size_t index);
  Presence(QALORA_CALL* GetOutputCharacteristic)(const CustomOp* op, size_t index);
  int(QALORA_CALL* GetInputMemoryType)(const CustomOp* op, size_t index);  // 0: plain memory
  int(QALORA_CALL* GetVariadicInputMinArity)(const CustomOp* op);
  int(QALORA_CALL* GetVariadicInputHomogeneity)(const CustomOp* op);
  int(QALORA_CALL* GetVariadicOutputMinArity)(const CustomOp* op);
  int(QALORA_CALL* GetVariadicOutputHomogeneity)(const CustomOp* op);
  Status*(QALORA_CALL* CreateKernelV2)(const CustomOp* op, const Api* api, const KernelInfo* info,
                                      void** kernel);
  Status*(QALORA_CALL* KernelComputeV2)(void* kernel, KernelContext* context);
  Status*(QALORA_CALL* InferOutputShapeFn)(const CustomOp* op, InferContext* context);
  int(QALORA_CALL* GetStartVersion)(const CustomOp* op);
  int(QALORA_CALL* GetEndVersion)(const CustomOp* op);
  Unused get_may_inplace;      // 22: null: no output shares memory with an input
  Unused release_may_inplace;  // 23
  Unused get_alias_map;        // 24: null, likewise
  Unused release_alias_map;    // 25
};

#define QALORA_SLOT(table, member, slot)                         \
  static_assert(offsetof(table, member) == slot * sizeof(void*), \
                #member " is not at slot " #slot)

QALORA_SLOT(Api, CreateStatus, 0);
QALORA_SLOT(Api, CreateCustomOpDomain, 26);
QALORA_SLOT(Api, CustomOpDomain_Add, 27);
QALORA_SLOT(Api, AddCustomOpDomain, 28);
QALORA_SLOT(Api, GetTensorMutableData, 51);
QALORA_SLOT(Api, CastTypeInfoToTensorInfo, 55);
QALORA_SLOT(Api, CreateTensorTypeAndShapeInfo, 57);
QALORA_SLOT(Api, SetTensorElementType, 58);
QALORA_SLOT(Api, SetDimensions, 59);
QALORA_SLOT(Api, GetTensorElementType, 60);
QALORA_SLOT(Api, GetDimensionsCount, 61);
QALORA_SLOT(Api, GetDimensions, 62);
QALORA_SLOT(Api, GetSymbolicDimensions, 63);
QALORA_SLOT(Api, GetTensorTypeAndShape, 65);
QALORA_SLOT(Api, KernelInfoGetAttribute_float, 85);
QALORA_SLOT(Api, KernelInfoGetAttribute_int64, 86);
QALORA_SLOT(Api, KernelInfoGetAttribute_string, 87);
QALORA_SLOT(Api, KernelContext_GetInputCount, 88);
QALORA_SLOT(Api, KernelContext_GetInput, 90);
QALORA_SLOT(Api, KernelContext_GetOutput, 91);
QALORA_SLOT(Api, ReleaseStatus, 93);
QALORA_SLOT(Api, ReleaseTypeInfo, 98);
QALORA_SLOT(Api, ReleaseTensorTypeAndShapeInfo, 99);
QALORA_SLOT(Api, KernelInfo_GetInputCount, 230);
QALORA_SLOT(Api, KernelInfo_GetInputTypeInfo, 234);
QALORA_SLOT(Api, ShapeInferContext_GetInputTypeShape, 268);
QALORA_SLOT(Api, ShapeInferContext_GetAttribute, 269);
QALORA_SLOT(Api, ShapeInferContext_SetOutputTypeShape, 270);
QALORA_SLOT(Api, SetSymbolicDimensions, 271);
QALORA_SLOT(Api, ReadOpAttr, 272);
QALORA_SLOT(Api, KernelContext_ParallelFor, 274);
static_assert(sizeof(Api) == 275 * sizeof(void*), "the declared part of the table has 275 slots");

QALORA_SLOT(CustomOp, create_kernel, 1);
QALORA_SLOT(CustomOp, GetName, 2);
QALORA_SLOT(CustomOp, GetInputType, 4);
QALORA_SLOT(CustomOp, GetOutputTypeCount, 7);
QALORA_SLOT(CustomOp, KernelDestroy, 9);
QALORA_SLOT(CustomOp, GetInputCharacteristic, 10);
QALORA_SLOT(CustomOp, GetInputMemoryType, 12);
QALORA_SLOT(CustomOp, GetVariadicOutputHomogeneity, 16);
QALORA_SLOT(CustomOp, CreateKernelV2, 17);
QALORA_SLOT(CustomOp, KernelComputeV2, 18);
QALORA_SLOT(CustomOp, InferOutputShapeFn, 19);
QALORA_SLOT(CustomOp, GetEndVersion, 21);
QALORA_SLOT(CustomOp, release_alias_map, 25);
static_assert(sizeof(CustomOp) == 26 * sizeof(void*), "an operator has 26 words");

#undef QALORA_SLOT

}  // namespace qalora::ort
