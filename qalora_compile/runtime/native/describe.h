// Types and shapes in the texts of errors.
#pragma once

#include <cstdio>

#include "layer.h"

namespace qalora {

inline const char* TypeName(Type type) {
  switch (type) {
    case Type::kFloat32: return "float32";
    case Type::kFloat16: return "float16";
    case Type::kUint8: return "uint8";
    case Type::kBool: return "bool";
    case Type::kOther: break;
  }
  return "another type";
}

// "[2, ?, 64]", cut off where the buffer ends. Dimensions beyond kMaxRank are not known.
struct ShapeText {
  char text[160] = "[";
  explicit ShapeText(const TensorInfo& info) {
    if (info.rank > kMaxRank) {
      std::snprintf(text, sizeof text, "of rank %lld", static_cast<long long>(info.rank));
      return;
    }
    size_t used = 1;
    for (int64_t i = 0; i < info.rank && used + 24 < sizeof text; ++i) {
      const char* comma = i ? ", " : "";
      char* end = text + used;
      const size_t room = sizeof text - used;
      used += info.dims[i] == kUnknown
                  ? std::snprintf(end, room, "%s?", comma)
                  : std::snprintf(end, room, "%s%lld", comma, static_cast<long long>(info.dims[i]));
    }
    std::snprintf(text + used, sizeof text - used, "]");
  }
};

}  // namespace qalora
