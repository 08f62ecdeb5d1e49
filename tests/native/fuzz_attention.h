// One node CachedAttention and one call of it, legal or damaged, with what has to come of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fake_runtime.h"
#include "fuzz_case.h"
#include "support.h"

namespace qalora_test {

struct AttentionCase {
  // Legal sizes, which damages then contradict.
  int64_t batch = 1, heads = 1, kv_heads = 1, queries = 1, past = 0, room = 0;
  int64_t width = 1, value_width = 1;
  bool bool_mask = true;

  qalora::ort::KernelInfo node;
  qalora::ort::KernelContext context;
  std::vector<std::unique_ptr<Exact>> buffers;
  Verdict create = Verdict::kLegal, run = Verdict::kLegal;
  std::string what = "legal attention";

  // Which of the operator's variants has this mask.
  size_t variant() const { return bool_mask ? 0 : 1; }
};

void MakeAttentionCase(Rng* rng, AttentionCase* out);

}  // namespace qalora_test
