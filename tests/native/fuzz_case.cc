#include "fuzz_case.h"

#include <algorithm>
#include <climits>
#include <cstring>

namespace qalora_test {
namespace {

using namespace qalora::ort;

constexpr int64_t kWild[] = {0,         1,         2,         -2,        -7,           INT_MIN,
                             INT64_MIN, INT64_MAX, 1ll << 31, 1ll << 32, (1ll << 62) + 1};

OpAttribute Integer(int64_t value) {
  OpAttribute attribute;
  attribute.integer = value;
  return attribute;
}

OpAttribute Real(float value) {
  OpAttribute attribute;
  attribute.kind = OpAttribute::kFloat;
  attribute.real = value;
  return attribute;
}

OpAttribute Text(const std::string& value) {
  OpAttribute attribute;
  attribute.kind = OpAttribute::kText;
  attribute.text = value;
  return attribute;
}

void Judge(Verdict* verdict, Verdict worse) { *verdict = std::max(*verdict, worse); }

void DrawLayer(Rng* rng, FuzzCase* c) {
  const int64_t bits[] = {2, 3, 4, 8}, groups[] = {16, 32, 48, 64, 128, 512};
  c->k = rng->Between(1, 200);
  c->n = rng->Between(1, 20);
  c->bits = rng->Pick(bits);
  c->group = rng->Pick(groups);
  c->compute = static_cast<int>(rng->Below(3));
  c->bias = rng->OneIn(2);
  c->x = rng->OneIn(2) ? kFloat : kHalf;
  c->parameter = rng->OneIn(2) ? kFloat : kHalf;
  if (rng->OneIn(100)) {
    c->leading.assign(15, 1);  // the largest rank
  } else {
    for (int64_t rank = rng->Below(4); rank > 0; --rank) c->leading.push_back(rng->Below(5));
  }
  if (rng->OneIn(100)) c->leading = {130};  // more than one block of rows
  if (rng->OneIn(100)) c->leading = {INT64_MAX, 0, INT64_MAX};  // no rows, whatever the rest says
  c->node.attributes = {{"K", Integer(c->k)},
                        {"N", Integer(c->n)},
                        {"bits", Integer(c->bits)},
                        {"group_size", Integer(c->group)},
                        {"stock_bits", Integer(INT64_MIN)}};  // others are ignored
  const char* const computes[] = {"fp32", "int16", "int8"};
  if (c->compute || rng->OneIn(2)) c->node.attributes["compute"] = Text(computes[c->compute]);
}

// The five inputs of the layer.
std::vector<TensorShapeInfo> Shapes(const FuzzCase& c) {
  const int64_t groups = (c.k + c.group - 1) / c.group;
  std::vector<TensorShapeInfo> shapes(5);
  shapes[0].type = c.x;
  shapes[0].dims = c.leading;
  shapes[0].dims.push_back(c.k);
  shapes[1].type = kByte;
  shapes[1].dims = {c.n, groups, c.group * c.bits / 8};
  shapes[2].type = shapes[3].type = c.parameter;
  shapes[2].dims = shapes[3].dims = {c.n, groups};
  shapes[4].type = c.x;
  shapes[4].dims = {c.n};
  return shapes;
}

// What the model states: all, or less. None of it is wrong.
void StateInputs(Rng* rng, FuzzCase* c) {
  const std::vector<TensorShapeInfo> shapes = Shapes(*c);
  const size_t count = c->bias ? 5 : 4;
  for (size_t i = 0; i < count; ++i) {
    auto type = std::make_unique<TypeInfo>();
    TensorShapeInfo& tensor = type->tensor;
    tensor = shapes[i];
    tensor.names.assign(tensor.dims.size(), "");
    const int64_t kind = rng->Below(12);
    for (size_t d = 0; kind < 4 && d < tensor.dims.size(); ++d) {
      if (!rng->OneIn(2)) continue;
      tensor.dims[d] = -1;
      if (rng->OneIn(2)) tensor.names[d] = "batch";
    }
    if (kind == 4) tensor.dims.clear(), tensor.names.clear();  // unknown, or a scalar
    if (kind == 5) type->is_tensor = false;
    if (kind == 6) type = nullptr;
    c->node.inputs.push_back(std::move(type));
  }
  if (!c->bias && rng->OneIn(3)) c->node.inputs.push_back(nullptr);  // an empty name in the model
}

void DamageInteger(Rng* rng, FuzzCase* c) {
  const char* const names[] = {"K", "N", "bits", "group_size"};
  const int64_t bits[] = {0, 1, 5, 6, 7, 9, 16, 32, -4}, groups[] = {1, 8, 15, 17, 24, 40, -16};
  const std::string name = rng->Pick(names);
  int64_t value = name == "bits" ? rng->Pick(bits) : rng->Pick(groups);
  if (name[0] == 'K' || name[0] == 'N') value = -rng->Below(100);
  const int64_t wild = rng->Pick(kWild);
  // Of the wild values only 1 and 2 are legal for anything.
  if (rng->OneIn(2) && wild != 1 && wild != 2) value = wild;
  c->node.attributes[name] = Integer(value);
  c->what += ", attribute " + name + " is " + std::to_string(value);
}

// Legal sizes that no memory holds. Shapes that the model states contradict them; without any, the
// layer may be taken, but the call's shapes contradict them too.
void MakeHuge(Rng* rng, FuzzCase* c) {
  const char* const names[] = {"K", "N", "group_size"};
  const std::string name = rng->Pick(names);
  const bool group = name == "group_size";
  const int64_t low = group ? 1 << 16 : 1 << 28, high = group ? 1 << 20 : INT_MAX;
  const int64_t value = rng->Between(low, high) * (group ? 16 : 1);
  c->node.attributes[name] = Integer(value);
  c->what += ", attribute " + name + " is " + std::to_string(value);
  c->node.inputs.clear();
  Judge(&c->create, rng->OneIn(4) ? Verdict::kEither : Verdict::kWrong);
  for (const TensorShapeInfo& shape : Shapes(*c)) {
    auto type = std::make_unique<TypeInfo>();
    type->tensor = shape;
    if (c->create == Verdict::kEither) type->tensor.dims.clear();
    c->node.inputs.push_back(std::move(type));
  }
  Judge(&c->run, Verdict::kWrong);
}

void DamageAttribute(Rng* rng, FuzzCase* c) {
  const char* const names[] = {"K", "N", "bits", "group_size"};
  const std::string texts[] = {"", "fp16", "INT8", "int8 ", "%s%n%s%n", "\xff\xfe",
                               "fifteen letters", "sixteen letters.", std::string(5000, 'x')};
  auto& attributes = c->node.attributes;
  const std::string name = rng->Pick(names);
  switch (rng->Below(6)) {
    case 0:
      attributes.erase(name);
      c->what += ", no attribute " + name;
      break;
    case 1:
      attributes[name] = rng->OneIn(2) ? Text("4") : Real(4);
      c->what += ", attribute " + name + " is no integer";
      break;
    case 2:
      attributes["compute"] = rng->OneIn(2) ? Integer(8) : Real(8);
      c->what += ", attribute compute is a number";
      break;
    case 3:
      attributes["compute"] = Text(rng->Pick(texts));
      c->what += ", attribute compute is \"" + attributes["compute"].text.substr(0, 20) + "\"";
      break;
    case 4: return MakeHuge(rng, c);
    default: DamageInteger(rng, c);
  }
  Judge(&c->create, Verdict::kWrong);
}

// A type that input `index` may not have. Another float type of x may be right.
ElementType WrongType(Rng* rng, size_t index, ElementType type) {
  const int types[] = {0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 13, 16, 20, 1000, -1, INT_MAX};
  for (;;) {
    const auto wrong = static_cast<ElementType>(rng->Pick(types));
    if (wrong != type && (index || (wrong != kFloat && wrong != kHalf))) return wrong;
  }
}

// Make type, rank or a dimension of one input wrong. The model writes -1 for an unknown dimension,
// and 0 dimensions for an unknown rank, so `stated` has neither.
void DamageShape(Rng* rng, size_t index, bool stated, TensorShapeInfo* info) {
  auto& dims = info->dims;
  const int64_t kind = rng->Below(3);
  if (kind == 0) {
    info->type = WrongType(rng, index, info->type);
  } else if (kind == 1 && index) {
    const size_t right = dims.size();
    do {
      dims.resize(static_cast<size_t>(rng->Between(stated ? 1 : 0, 20)), 1);
    } while (dims.size() == right);
  } else if (kind == 1) {
    dims.assign(static_cast<size_t>(stated || rng->OneIn(2) ? rng->Between(17, 20) : 0), 1);
  } else {
    int64_t& last = index ? dims[static_cast<size_t>(rng->Below(dims.size()))] : dims.back();
    const int64_t right = last;
    while (last == right) last = rng->OneIn(2) ? rng->Pick(kWild) : right + rng->Between(1, 3);
  }
  info->names.assign(dims.size(), "");
}

void DamageStated(Rng* rng, FuzzCase* c) {
  const size_t index = static_cast<size_t>(rng->Below(c->bias ? 5 : 4));
  auto type = std::make_unique<TypeInfo>();
  type->tensor = Shapes(*c)[index];
  DamageShape(rng, index, true, &type->tensor);
  c->node.inputs[index] = std::move(type);
  c->what += ", the model states a wrong input " + std::to_string(index);
  Judge(&c->create, Verdict::kWrong);
}

// A finite value of a float type, or any byte.
void FillElement(Rng* rng, ElementType type, uint8_t* at) {
  const float value = static_cast<float>(rng->Uniform());
  const uint16_t half = static_cast<uint16_t>(rng->Below(0x4000) | (rng->Next() & 0x8000));
  if (type == kFloat) std::memcpy(at, &value, sizeof value);
  if (type == kHalf) std::memcpy(at, &half, sizeof half);
  if (type == kByte) *at = static_cast<uint8_t>(rng->Next() >> 30);
}

std::unique_ptr<Value> MakeTensor(Rng* rng, const TensorShapeInfo& info, FuzzCase* c) {
  auto value = std::make_unique<Value>();
  value->info = info;
  int64_t count = 1;
  const bool empty = std::count(info.dims.begin(), info.dims.end(), 0) > 0;
  for (const int64_t size : info.dims) count = empty ? 0 : count * size;
  const size_t width = info.type == kFloat ? 4 : info.type == kHalf ? 2 : 1;
  c->buffers.push_back(std::make_unique<Exact>(static_cast<size_t>(count) * width));
  value->data = c->buffers.back()->data();
  for (int64_t i = 0; i < count; ++i) FillElement(rng, info.type, value->data + i * width);
  return value;
}

void FeedInputs(Rng* rng, FuzzCase* c) {
  const std::vector<TensorShapeInfo> shapes = Shapes(*c);
  for (size_t i = 0; i < 4; ++i) c->context.inputs.push_back(MakeTensor(rng, shapes[i], c));
  const int64_t kind = rng->Below(4);
  if (c->bias) {
    c->context.inputs.push_back(MakeTensor(rng, shapes[4], c));
  } else if (kind == 0) {
    c->context.inputs.push_back(nullptr);
  }
  c->context.threads = rng->OneIn(50);
}

// Rows beyond what the operator takes, and just within: then the runtime has no memory for them.
void ManyRows(Rng* rng, FuzzCase* c) {
  auto& dims = c->context.inputs[0]->info.dims;
  const bool within = rng->OneIn(2);
  dims = {1ll << 20, within ? 1ll << 11 : (1ll << 11) + 1, c->k};
  if (!within && rng->OneIn(2)) dims = {INT64_MAX, INT64_MAX, INT64_MAX, c->k};
  if (!within && rng->OneIn(4)) dims = {INT64_MIN, -1, c->k};
  c->what += within ? ", 2^31 rows" : ", too many rows";
  Judge(&c->run, within ? Verdict::kEither : Verdict::kWrong);
}

void DamageCall(Rng* rng, FuzzCase* c) {
  auto& inputs = c->context.inputs;
  const size_t index = static_cast<size_t>(rng->Below(c->bias ? 5 : 4));
  const int64_t kind = rng->Below(5);
  if (kind == 0 && c->run != Verdict::kWrong) return ManyRows(rng, c);
  Judge(&c->run, Verdict::kWrong);
  if (kind == 1) {
    inputs.resize(static_cast<size_t>(rng->Below(4)));
    c->what += ", too few inputs";
  } else if (kind == 2) {
    inputs[index % 4] = nullptr;
    c->what += ", no input " + std::to_string(index % 4);
  } else {
    DamageShape(rng, index, false, &inputs[index]->info);
    inputs[index]->data = nullptr;  // nothing may read it
    c->what += ", the call has a wrong input " + std::to_string(index);
  }
}

}  // namespace

void MakeCase(Rng* rng, FuzzCase* out) {
  DrawLayer(rng, out);
  StateInputs(rng, out);
  FeedInputs(rng, out);
  if (rng->OneIn(2)) return;
  if (rng->OneIn(3)) DamageStated(rng, out);
  if (rng->OneIn(3)) DamageCall(rng, out);
  if (rng->OneIn(3)) DamageAttribute(rng, out);
}

}  // namespace qalora_test
