#include "layer.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "describe.h"

namespace qalora {
namespace {

constexpr int64_t kMaxSide = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGroup = int64_t{1} << 24;
const char* const kComputes[] = {"fp32", "int16", "int8"};  // of three, two and one digits
const char* const kNames[kInputs] = {"x", "codes", "scale", "zero_point", "bias"};

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
bool Fail(Error* error, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int used = std::snprintf(error->text, sizeof error->text, "GroupQuantLinear: ");
  std::vsnprintf(error->text + used, sizeof error->text - used, format, arguments);
  va_end(arguments);
  return false;
}

bool CheckSide(const char* name, int64_t value, Error* error) {
  if (value >= 1 && value <= kMaxSide) return true;
  return Fail(error, "attribute %s is %lld, expected 1 to %lld", name,
              static_cast<long long>(value), static_cast<long long>(kMaxSide));
}

bool IsFloat(Type type) { return type == Type::kFloat32 || type == Type::kFloat16; }

bool CheckType(int index, Type type, Type wanted, Error* error) {
  if (type == wanted) return true;
  return Fail(error, "input %d (%s) is %s, expected %s", index, kNames[index], TypeName(type),
              TypeName(wanted));
}

bool CheckTypes(const TensorInfo (&inputs)[kInputs], Error* error) {
  const int floats[] = {0, 2};
  for (const int i : floats) {
    if (!IsFloat(inputs[i].type)) {
      return Fail(error, "input %d (%s) is %s, expected float32 or float16", i, kNames[i],
                  TypeName(inputs[i].type));
    }
  }
  return CheckType(1, inputs[1].type, Type::kUint8, error) &&
         CheckType(3, inputs[3].type, inputs[2].type, error) &&
         (!inputs[4].present || CheckType(4, inputs[4].type, inputs[0].type, error));
}

template <int rank>
bool CheckShape(int index, const TensorInfo& info, const int64_t (&wanted)[rank],
                const char* meaning, Error* error) {
  if (info.rank == kUnknown) return true;
  bool fits = info.rank == rank;
  for (int i = 0; fits && i < rank; ++i) {
    fits = info.dims[i] == wanted[i] || info.dims[i] == kUnknown;
  }
  if (fits) return true;
  TensorInfo expected;
  expected.rank = rank;
  std::memcpy(expected.dims, wanted, sizeof wanted);
  return Fail(error, "input %d (%s) has shape %s, expected %s = %s", index, kNames[index],
              ShapeText(info).text, meaning, ShapeText(expected).text);
}

bool CheckX(const Layer& layer, const TensorInfo& x, Error* error) {
  if (x.rank == kUnknown) return true;
  if (x.rank < 1 || x.rank > kMaxRank) {
    return Fail(error, "input 0 (x) has rank %lld, expected 1 to %d",
                static_cast<long long>(x.rank), kMaxRank);
  }
  for (int64_t i = 0; i < x.rank; ++i) {
    if (x.dims[i] < kUnknown) {
      return Fail(error, "input 0 (x) has shape %s with a negative dimension", ShapeText(x).text);
    }
  }
  const int64_t last = x.dims[x.rank - 1];
  if (last == layer.k || last == kUnknown) return true;
  return Fail(error, "input 0 (x) has shape %s, expected K = %lld as its last dimension",
              ShapeText(x).text, static_cast<long long>(layer.k));
}

}  // namespace

bool CheckAttributes(const Attributes& attributes, Layer* layer, Error* error) {
  if (!CheckSide("K", attributes.k, error) || !CheckSide("N", attributes.n, error)) return false;
  const int64_t bits = attributes.bits;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    return Fail(error, "attribute bits is %lld, expected 2, 3, 4 or 8",
                static_cast<long long>(bits));
  }
  const int64_t group = attributes.group_size;
  if (group < 16 || group > kMaxGroup || group % 16) {
    return Fail(error, "attribute group_size is %lld, expected a multiple of 16, 16 to %lld",
                static_cast<long long>(group), static_cast<long long>(kMaxGroup));
  }
  const char* compute = attributes.compute ? attributes.compute : kComputes[0];
  int digits = 0;
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(compute, kComputes[i]) == 0) digits = 3 - i;
  }
  if (!digits) {
    return Fail(error, "attribute compute is \"%.40s\", expected \"fp32\", \"int16\" or \"int8\"",
                compute);
  }
  layer->k = attributes.k;
  layer->n = attributes.n;
  layer->groups = (attributes.k + group - 1) / group;
  layer->group_size = group;
  layer->bits = static_cast<int>(bits);
  layer->digits = digits;
  return true;
}

bool CheckInputs(const Layer& layer, const TensorInfo (&inputs)[kInputs], Error* error) {
  for (int i = 0; i < 4; ++i) {
    if (!inputs[i].present) {
      return Fail(error, "input %d (%s) is missing, and it is required", i, kNames[i]);
    }
  }
  const int64_t codes[3] = {layer.n, layer.groups, layer.group_bytes()};
  const int64_t parameters[2] = {layer.n, layer.groups};
  const int64_t bias[1] = {layer.n};
  const char* per_group = "[N, ceil(K / group_size)]";
  return CheckTypes(inputs, error) && CheckX(layer, inputs[0], error) &&
         CheckShape(1, inputs[1], codes, "[N, ceil(K / group_size), group_size * bits / 8]",
                    error) &&
         CheckShape(2, inputs[2], parameters, per_group, error) &&
         CheckShape(3, inputs[3], parameters, per_group, error) &&
         (!inputs[4].present || CheckShape(4, inputs[4], bias, "[N]", error));
}

bool CountRows(const TensorInfo& x, int64_t* rows, Error* error) {
  // The bound keeps rows * max(K, N) far from overflow.
  constexpr int64_t kMaxRows = int64_t{1} << 31;
  bool empty = false;
  for (int64_t i = 0; i + 1 < x.rank; ++i) empty = empty || x.dims[i] == 0;
  *rows = empty ? 0 : 1;
  for (int64_t i = 0; !empty && i + 1 < x.rank; ++i) {
    if (x.dims[i] < 0 || x.dims[i] > kMaxRows / *rows) {
      return Fail(error, "input 0 (x) has shape %s: more than %lld rows", ShapeText(x).text,
                  static_cast<long long>(kMaxRows));
    }
    *rows *= x.dims[i];
  }
  return true;
}

}  // namespace qalora
