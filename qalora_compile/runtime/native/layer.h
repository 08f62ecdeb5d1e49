// What a GroupQuantLinear node says about itself, checked: attributes, input types and shapes.
//
// Plain C++ without ONNX Runtime, so that the operator, the kernel test and the fuzzer call the same
// checks. Every failure fills an Error; nothing here throws, aborts or reads tensor data.
#pragma once

#include <cstdint>

namespace qalora {

constexpr int kInputs = 5;     // x, codes, scale, zero_point, bias
constexpr int kMaxRank = 16;   // of x
constexpr int64_t kUnknown = -1;

enum class Type { kFloat32, kFloat16, kUint8, kBool, kOther };

struct Error {
  char text[512] = {};
  bool raised() const { return text[0] != '\0'; }
};

// The attributes as the node gives them. `compute` may be null where it is absent.
struct Attributes {
  int64_t k = 0;
  int64_t n = 0;
  int64_t bits = 0;
  int64_t group_size = 0;
  const char* compute = nullptr;
};

// Type and shape of one input, as far as known: rank or a dimension may be kUnknown before the model
// runs.
struct TensorInfo {
  bool present = false;
  Type type = Type::kOther;
  int64_t rank = kUnknown;
  int64_t dims[kMaxRank] = {};
};

// A layer whose attributes are legal. All sizes fit int64 with room: K and N are below 2^31 and
// group_size is at most 2^24.
struct Layer {
  int64_t k = 0;
  int64_t n = 0;
  int64_t groups = 0;  // L = ceil(K / group_size)
  int64_t group_size = 0;
  int bits = 0;
  // Signed digits of 7 bits that an activation is split into: compute = "fp32" takes 3, "int16" 2,
  // "int8" 1.
  int digits = 3;

  // Codes of a row, padding of the tail group included.
  int64_t padded_k() const { return groups * group_size; }
  // Bytes of one group, the last dimension of `codes`.
  int64_t group_bytes() const { return group_size * bits / 8; }
  int64_t row_bytes() const { return groups * group_bytes(); }
  // Width of a code in the part of a row that comes first: 3-bit rows start with 2-bit codes.
  int low_bits() const { return bits == 3 ? 2 : bits; }
  // Bytes of that part; the high-bit plane of 3-bit rows starts behind it.
  int64_t low_bytes() const { return padded_k() * low_bits() / 8; }
  // Activations that share one scale: never across two groups.
  int64_t block() const { return group_size % 32 == 0 ? 32 : 16; }
};

// Check the attributes and fill `layer`; false with `error` filled where one is illegal.
bool CheckAttributes(const Attributes& attributes, Layer* layer, Error* error);

// Check types and shapes of the five inputs against the layer, kUnknown fitting everything.
bool CheckInputs(const Layer& layer, const TensorInfo (&inputs)[kInputs], Error* error);

// Rows of x, the product of its leading dimensions, all of them known; false where it overflows.
bool CountRows(const TensorInfo& x, int64_t* rows, Error* error);

}  // namespace qalora
