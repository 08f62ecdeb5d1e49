// One node and one call of it, legal or damaged, with what has to come of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fake_runtime.h"
#include "support.h"

namespace qalora_test {

// Ordered, so that the worst of several damages counts. kEither is for what depends on memory.
enum class Verdict { kLegal, kEither, kWrong };

struct FuzzCase {
  // A legal layer, which damages then contradict.
  int64_t k = 1, n = 1, bits = 4, group = 16;
  int compute = 0;  // "fp32", "int16" or "int8"
  bool bias = false;
  qalora::ort::ElementType x = qalora::ort::kFloat, parameter = qalora::ort::kFloat;
  std::vector<int64_t> leading;  // dimensions of x before the last

  qalora::ort::KernelInfo node;
  qalora::ort::KernelContext context;
  std::vector<std::unique_ptr<Exact>> buffers;
  Verdict create = Verdict::kLegal, run = Verdict::kLegal;
  std::string what = "legal";

  // Which of the operator's variants has these types.
  size_t variant() const {
    return (x == qalora::ort::kHalf ? 1u : 0u) | (parameter == qalora::ort::kHalf ? 2u : 0u);
  }
};

void MakeCase(Rng* rng, FuzzCase* out);

}  // namespace qalora_test
