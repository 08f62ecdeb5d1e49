// Levels that multiply panels of bytes by instructions on matrices, and leave everything else to
// `base`, the level with the same vectors. V is derived from that level's vector type, and has its own
// PanelLayout and PanelProduct.
#pragma once

#include "panel_template.h"
#include "prepare_template.h"

namespace qalora {
namespace {

template <class V, int bits>
void RunPanelBits(const Job& job, int64_t begin, int64_t end, float* scratch) {
  switch (job.plan.digits) {
    case 1: return RunBytes<V, bits, 1>(job, begin, end, scratch);
    case 2: return RunBytes<V, bits, 2>(job, begin, end, scratch);
    default: return RunBytes<V, bits, 3>(job, begin, end, scratch);
  }
}

template <class V, const KernelSet& base>
void RunMatrix(const Job& job, int64_t begin, int64_t end, float* scratch) {
  if (job.few() || job.plan.float_panels) return base.run(job, begin, end, scratch);
  switch (job.layer->bits) {
    case 2: return RunPanelBits<V, 2>(job, begin, end, scratch);
    case 3: return RunPanelBits<V, 3>(job, begin, end, scratch);
    case 4: return RunPanelBits<V, 4>(job, begin, end, scratch);
    default: return RunPanelBits<V, 8>(job, begin, end, scratch);
  }
}

template <class V, const KernelSet& base>
void PrepareMatrix(const Job& job, int64_t row, float* scratch) {
  job.few() ? base.prepare(job, row, scratch) : Prepare<V>(job, row, scratch);
}

template <class V, const KernelSet& base>
KernelSet MakeMatrixKernels(const char* name) {
  return {name, V::kStep, V::kLanes, V::kPanelDigits, PrepareMatrix<V, base>, RunMatrix<V, base>,
          base.widen, base.narrow, base.attend};
}

}  // namespace
}  // namespace qalora
