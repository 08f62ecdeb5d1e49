// Malformed and borderline nodes and calls, through the interface that ONNX Runtime uses.
//
// fuzz [SEED [CASES]]: each case makes a node, lets the library infer its shape, create its kernel
// and run it. A legal case has to succeed and a wrong one has to end in a status that says so; in
// all of them nothing may crash, leak or write elsewhere (the sanitizers watch that).

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fake_runtime.h"
#include "layer_case.h"

namespace qalora_test {
namespace {

using namespace qalora::ort;

struct Node {
  int64_t k, n, bits, group;
  bool int8, bias;
  ElementType x = kFloat, parameter = kFloat;
  std::vector<int64_t> lead;
  int64_t groups() const { return (k + group - 1) / group; }
};

template <class T, size_t count>
T Pick(const T (&from)[count], Random* random) {
  return from[random->Below(count)];
}

Node DrawNode(Random* random) {
  static const int64_t kBits[] = {2, 3, 4, 8}, kGroups[] = {16, 32, 48, 64, 128};
  Node node;
  node.k = 1 + random->Below(200);
  node.n = 1 + random->Below(20);
  node.bits = Pick(kBits, random);
  node.group = Pick(kGroups, random);
  node.int8 = random->Below(2);
  node.bias = random->Below(2);
  node.x = random->Below(2) ? kFloat : kHalf;
  node.parameter = random->Below(2) ? kFloat : kHalf;
  for (int64_t rank = random->Below(3); rank > 0; --rank) node.lead.push_back(random->Below(4));
  return node;
}

OpAttribute Integer(int64_t value) {
  OpAttribute attribute;
  attribute.integer = value;
  return attribute;
}

OpAttribute Text(const char* value) {
  OpAttribute attribute;
  attribute.kind = OpAttribute::kText;
  attribute.text = value;
  return attribute;
}

OpAttribute Real(float value) {
  OpAttribute attribute;
  attribute.kind = OpAttribute::kFloat;
  attribute.real = value;
  return attribute;
}

std::vector<TensorShapeInfo> Shapes(const Node& node) {
  std::vector<int64_t> x = node.lead;
  x.push_back(node.k);
  const std::vector<int64_t> parameters = {node.n, node.groups()};
  std::vector<TensorShapeInfo> shapes = {
      {node.x, x, {}},
      {kByte, {node.n, node.groups(), node.group * node.bits / 8}, {}},
      {node.parameter, parameters, {}},
      {node.parameter, parameters, {}},
  };
  if (node.bias) shapes.push_back({node.x, {node.n}, {}});
  return shapes;
}

std::map<std::string, OpAttribute> AttributesOf(const Node& node, Random* random) {
  std::map<std::string, OpAttribute> attributes = {{"K", Integer(node.k)},
                                                   {"N", Integer(node.n)},
                                                   {"bits", Integer(node.bits)},
                                                   {"group_size", Integer(node.group)}};
  if (node.int8 || random->Below(2)) attributes["compute"] = Text(node.int8 ? "int8" : "fp32");
  return attributes;
}

// Each damage makes the case illegal, whatever it was.
void DamageAttribute(std::map<std::string, OpAttribute>* attributes, Random* random) {
  static const char* const kNames[] = {"K", "N", "bits", "group_size"};
  static const int64_t kWild[] = {0,         -1,        INT64_MIN, INT64_MAX,
                                  INT_MIN,   INT64_MIN + 1, int64_t{1} << 40, int64_t{1} << 32};
  static const char* const kTexts[] = {"", "fp16", "INT8", "int8 ", "a text longer than the buffer"};
  switch (random->Below(4)) {
    case 0: attributes->erase(Pick(kNames, random)); return;
    case 1: (*attributes)[Pick(kNames, random)] = Integer(Pick(kWild, random)); return;
    case 2: (*attributes)[Pick(kNames, random)] = random->Below(2) ? Text("4") : Real(4); return;
    default: break;
  }
  (*attributes)["compute"] = random->Below(3) == 0   ? Integer(8)
                             : random->Below(2) == 0 ? Real(1.5f)
                                                     : Text(Pick(kTexts, random));
}

void DamageShape(std::vector<TensorShapeInfo>* shapes, Random* random) {
  const int64_t index = random->Below(static_cast<int64_t>(shapes->size()));
  TensorShapeInfo& info = (*shapes)[static_cast<size_t>(index)];
  static const int64_t kWild[] = {0, 1 << 30, int64_t{1} << 62, INT64_MAX, -5, INT64_MIN};
  switch (random->Below(4)) {
    case 0:
      info.type = info.type == kByte ? kFloat : random->Below(2) ? kByte : kUndefined;
      return;
    case 1: info.dims.push_back(info.dims.back() + 1); return;
    case 2: info.dims.assign(static_cast<size_t>(17 + random->Below(4)), 1); return;
    default: break;
  }
  const int64_t wild = Pick(kWild, random);
  info.dims.back() = wild == info.dims.back() ? wild + 1 : wild;
}

struct Buffers {
  std::vector<std::unique_ptr<Block>> blocks;
};

// Tensors with data at their exact size; wild shapes get none: nothing may read it.
void Feed(const std::vector<TensorShapeInfo>& shapes, bool legal, KernelContext* context,
          Buffers* buffers, Random* random) {
  for (const TensorShapeInfo& info : shapes) {
    auto value = std::make_unique<Value>();
    value->info = info;
    if (legal) {
      int64_t bytes = info.type == kByte ? 1 : info.type == kHalf ? 2 : 4;
      for (const int64_t size : info.dims) bytes *= size;
      buffers->blocks.push_back(std::make_unique<Block>(static_cast<size_t>(bytes), 0));
      value->data = buffers->blocks.back()->data();
      for (int64_t i = 0; i < bytes; ++i) value->data[i] = static_cast<uint8_t>(random->Next() >> 30);
    }
    context->inputs.push_back(std::move(value));
  }
}

bool Fail(uint64_t number, const std::string& why) {
  std::printf("FAILED case %llu: %s\n", static_cast<unsigned long long>(number), why.c_str());
  return false;
}

// A status of ours, or of a fault that was passed on; releases it.
bool Explains(Status* status, bool faults) {
  const bool ours = status->text.rfind("GroupQuantLinear: ", 0) == 0;
  const bool passed_on = status->text == "the output is too large" || faults;
  Release(status);
  return ours || passed_on;
}

enum Damage { kNone, kAttribute, kStaticShape, kRunShape, kMissingInput, kFaults, kDamages };

bool RunCase(uint64_t number, uint64_t seed, const Domain& domain) {
  Random random(seed * 1000003 + number);
  const Node node = DrawNode(&random);
  const auto damage = static_cast<Damage>(random.Below(kDamages));
  KernelInfo info;
  info.attributes = AttributesOf(node, &random);
  if (damage == kAttribute) DamageAttribute(&info.attributes, &random);
  std::vector<TensorShapeInfo> shapes = Shapes(node), stated = shapes;
  if (damage == kStaticShape) DamageShape(&stated, &random);
  for (TensorShapeInfo& shape : stated) {
    if (damage != kStaticShape && random.Below(3) == 0) {  // unknown, as it often is
      for (int64_t& size : shape.dims) size = random.Below(2) ? -1 : size;
    }
    auto type = std::make_unique<TypeInfo>();
    type->tensor = shape;
    info.inputs.push_back(std::move(type));
  }
  const int variant = (node.x == kHalf ? 1 : 0) | (node.parameter == kHalf ? 2 : 0);
  const CustomOp* op = domain.ops[static_cast<size_t>(variant)];
  const int64_t before = Alive();
  FailCall(damage == kFaults ? random.Below(60) : -1);

  InferContext infer;
  infer.node = &info;
  Release(op->InferOutputShapeFn(op, &infer));
  if (infer.stated && infer.output.dims.back() != node.n && damage != kAttribute) {
    return Fail(number, "the inferred shape is wrong");
  }
  void* kernel = nullptr;
  Status* status = op->CreateKernelV2(op, Runtime("1.32.0")->GetApi(18), &info, &kernel);
  if (status) {
    if (damage == kNone || damage == kRunShape || damage == kMissingInput) {
      return Fail(number, "a legal node is refused: " + status->text);
    }
    if (!Explains(status, damage == kFaults)) return Fail(number, "a status that says nothing");
  } else if (damage == kAttribute || damage == kStaticShape) {
    return Fail(number, "a wrong node is taken");
  }
  if (kernel) {
    const bool legal = damage == kNone || damage == kFaults;
    if (damage == kRunShape) DamageShape(&shapes, &random);
    if (damage == kMissingInput) shapes.resize(static_cast<size_t>(random.Below(4)));
    KernelContext context;
    Buffers buffers;
    Feed(shapes, legal, &context, &buffers, &random);
    status = op->KernelComputeV2(kernel, &context);
    op->KernelDestroy(kernel);
    if (status && damage == kNone) return Fail(number, "a legal call fails: " + status->text);
    if (!status && !legal) return Fail(number, "a wrong call succeeds");
    if (status && !Explains(status, true)) return Fail(number, "a status that says nothing");
  }
  FailCall(-1);
  return Alive() == before || Fail(number, "something was not released");
}

}  // namespace
}  // namespace qalora_test

int main(int count, char** values) {
  using namespace qalora_test;
  const uint64_t seed = count > 1 ? std::strtoull(values[1], nullptr, 10) : 1;
  const uint64_t cases = count > 2 ? std::strtoull(values[2], nullptr, 10) : 100000;
  qalora::ort::SessionOptions options;
  if (RegisterCustomOps(&options, Runtime("1.32.0")) || !options.domain) {
    std::printf("FAILED: the library does not register\n");
    return 1;
  }
  for (uint64_t number = 0; number < cases; ++number) {
    if (!RunCase(number, seed, *options.domain)) return 1;
  }
  std::printf("fuzz: %llu cases, seed %llu: every wrong one was refused, every legal one ran\n",
              static_cast<unsigned long long>(cases), static_cast<unsigned long long>(seed));
  return 0;
}
