// The functions that the shared library exports.

#include "attention_op.h"
#include "dispatch.h"
#include "op.h"

#if defined(_WIN32)
#define QALORA_EXPORT extern "C" __declspec(dllexport)
#else
#define QALORA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if !defined(QALORA_VERSION)
#define QALORA_VERSION "unknown"
#endif

namespace {

// Operators and their domain, made by the first session and then kept: sessions refer to them for as
// long as they live, and the runtime has no call that says when the last one is gone.
struct Registry {
  qalora::GroupQuantLinearOp ops[qalora::kOpVariants];
  qalora::CachedAttentionOp attention[qalora::kAttentionVariants];
  qalora::ort::Domain* domain = nullptr;
  qalora::ort::Status* status = nullptr;

  Registry(const qalora::ort::Api* api, bool infer_shapes) {
    status = api->CreateCustomOpDomain("qalora", &domain);
    for (int variant = 0; !status && variant < qalora::kOpVariants; ++variant) {
      qalora::MakeOp(variant, api, infer_shapes, &ops[variant]);
      status = api->CustomOpDomain_Add(domain, &ops[variant]);
    }
    for (int variant = 0; !status && variant < qalora::kAttentionVariants; ++variant) {
      qalora::MakeAttentionOp(variant, &attention[variant]);
      status = api->CustomOpDomain_Add(domain, &attention[variant]);
    }
  }
};

}  // namespace

// ONNX Runtime calls this by name for each set of session options the library is registered with.
QALORA_EXPORT qalora::ort::Status* QALORA_CALL
RegisterCustomOps(qalora::ort::SessionOptions* options, const qalora::ort::ApiBase* base) {
  const qalora::ort::Api* api = base->GetApi(qalora::ort::kApiVersion);
  if (!api) {
    // Version 1 of the table has the only slot that is needed to say so.
    const qalora::ort::Api* oldest = base->GetApi(1);
    return oldest ? oldest->CreateStatus(
                        qalora::ort::kFail,
                        "the qalora custom-operator library needs ONNX Runtime 1.18 or newer")
                  : nullptr;
  }
  static Registry registry(api, qalora::CanInferShapes(base->GetVersionString()));
  if (registry.status) {
    return api->CreateStatus(qalora::ort::kFail, "the domain qalora could not be registered");
  }
  return api->AddCustomOpDomain(options, registry.domain);
}

// The level that this CPU takes, unless QALORA_KERNEL says otherwise.
QALORA_EXPORT const char* QaloraKernelLevel() { return qalora::BestKernels()->name; }

// All levels of this CPU, slowest first, with commas.
QALORA_EXPORT const char* QaloraKernelLevels() { return qalora::KernelNames(); }

// Why a level that this CPU has is not among them; empty where none is missing.
QALORA_EXPORT const char* QaloraKernelNote() { return qalora::KernelNote(); }

// The version of the package that the library was built with.
QALORA_EXPORT const char* QaloraVersion() { return QALORA_VERSION; }
