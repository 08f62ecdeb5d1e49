// A level's kernels, over its vector type V; each level's file includes this with its own V.
//
// V provides: I (32-bit lanes of codes), F (float lanes), Sum (32-bit integer lanes), Acc (sums on
// their way, which may be narrower), kStep bytes, kTall rows of x in a panel's tile,
// kPanelDigits (KernelSet::panel_digits), kWide
// weight rows in a tile of few rows;
// Load, LoadPartial, Store, SetBytes, And, Shr<n>, Transpose, Bits, Floats; High, AddHigh<f>;
// Field<width, index>, SmallByte<index>; LoadX, BroadcastX;
// ZeroAcc, Seed<bits>, Dot<bits>, Settle<bits, more> (a total moves up by a digit where there are
// more, and the sums of the next one are added: in Seed or in Settle), ToFloat;
// ZeroF, SetF, LoadF, StoreF, Mul, Add, Sub, Negate, Fma, Reduce4; Lanes, LoadLanes, Permute;
// Max (the second where one is NaN), StreamF (past the caches where there is such a store), Fence;
// LoadParameter, Prefetch;
// LargestBits16, Round16; StoreHalf.
#pragma once

#include "attention_template.h"
#include "panel_template.h"
#include "prepare_template.h"
#include "rows_template.h"

namespace qalora {
namespace {

template <class V, int bits, int digits>
void RunDigits(const Job& job, int64_t begin, int64_t end, float* scratch) {
  job.few() ? RunFew<V, bits, digits>(job, begin, end)
            : RunMany<V, bits, digits>(job, begin, end, scratch);
}

template <class V, int bits>
void RunBits(const Job& job, int64_t begin, int64_t end, float* scratch) {
  switch (job.plan.digits) {
    case 1: return RunDigits<V, bits, 1>(job, begin, end, scratch);
    case 2: return RunDigits<V, bits, 2>(job, begin, end, scratch);
    default: return RunDigits<V, bits, 3>(job, begin, end, scratch);
  }
}

template <class V>
void Run(const Job& job, int64_t begin, int64_t end, float* scratch) {
  switch (job.layer->bits) {
    case 2: return RunBits<V, 2>(job, begin, end, scratch);
    case 3: return RunBits<V, 3>(job, begin, end, scratch);
    case 4: return RunBits<V, 4>(job, begin, end, scratch);
    default: return RunBits<V, 8>(job, begin, end, scratch);
  }
}

template <class V>
constexpr KernelSet MakeKernels(const char* name) {
  return {name,   V::kStep, V::kLanes, V::kPanelDigits, Prepare<V>,
          Run<V>, Widen<V>, Narrow<V>, Attend<V>};
}

}  // namespace
}  // namespace qalora
