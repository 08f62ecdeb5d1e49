#include "fuzz_attention.h"

#include <algorithm>
#include <climits>
#include <cstring>

namespace qalora_test {
namespace {

using namespace qalora::ort;

constexpr int64_t kWild[] = {0, -1, 7, 1000, INT_MAX, INT64_MIN, INT64_MAX, 1ll << 32, 1ll << 62};
constexpr int64_t kMostHeads = 1ll << 20;

void Judge(Verdict* verdict, Verdict worse) { *verdict = std::max(*verdict, worse); }

void DrawSizes(Rng* rng, AttentionCase* c) {
  const int64_t queries[] = {0, 1, 1, 1, 2, 9}, pasts[] = {0, 1, 5, 66}, widths[] = {1, 3, 16, 33};
  c->batch = rng->OneIn(20) ? 0 : rng->Between(1, 2);
  c->kv_heads = rng->Between(1, 2);
  c->heads = c->kv_heads * rng->Between(1, 5);
  c->queries = rng->Pick(queries);
  c->past = rng->Pick(pasts);
  c->room = c->queries && rng->OneIn(2) ? c->queries + rng->Below(20) : 0;
  c->width = rng->Pick(widths);
  c->value_width = rng->Pick(widths);
  c->bool_mask = rng->OneIn(2);
}

// The six inputs. Rows of the past are the past, or a buffer with room for the new ones and more.
std::vector<TensorShapeInfo> Shapes(Rng* rng, const AttentionCase& c) {
  std::vector<TensorShapeInfo> shapes(6);
  for (TensorShapeInfo& shape : shapes) shape.type = kFloat;
  if (c.bool_mask) shapes[3].type = kBool;
  const int64_t rows = c.past + c.room, some = rng->Below(4);
  shapes[0].dims = {c.batch, c.queries, c.heads * c.width};
  shapes[1].dims = {c.batch, c.queries, c.kv_heads * c.width};
  shapes[2].dims = {c.batch, c.queries, c.kv_heads * c.value_width};
  shapes[3].dims = {some & 1 ? 1 : c.batch, some & 2 ? 1 : c.heads, c.queries, c.past + c.queries};
  shapes[4].dims = {c.batch, c.kv_heads, rows, c.width};
  shapes[5].dims = {c.batch, c.kv_heads, rows, c.value_width};
  return shapes;
}

std::unique_ptr<Value> MakeTensor(Rng* rng, const TensorShapeInfo& info, AttentionCase* c) {
  auto value = std::make_unique<Value>();
  value->info = info;
  int64_t count = 1;
  for (const int64_t size : info.dims) count *= size;
  const size_t width = info.type == kBool ? 1 : 4;
  c->buffers.push_back(std::make_unique<Exact>(static_cast<size_t>(count) * width));
  value->data = c->buffers.back()->data();
  for (int64_t i = 0; i < count; ++i) {
    const float number = static_cast<float>(rng->Uniform());
    if (width == 4) std::memcpy(value->data + 4 * i, &number, sizeof number);
    if (width == 1) value->data[i] = !rng->OneIn(3);
  }
  return value;
}

bool LegalHeads(int64_t heads, int64_t kv_heads) {
  return heads >= 1 && heads <= kMostHeads && kv_heads >= 1 && heads % kv_heads == 0;
}

void DamageAttribute(Rng* rng, AttentionCase* c) {
  const char* const names[] = {"q_num_heads", "kv_num_heads", "scale"};
  const std::string name = rng->Pick(names);
  OpAttribute& attribute = c->node.attributes[name];
  c->what += ", a wrong " + name;
  if (name == "scale" || rng->OneIn(3)) {
    Judge(&c->create, Verdict::kWrong);
    if (rng->OneIn(2)) {
      c->node.attributes.erase(name);
    } else {
      attribute.kind = OpAttribute::kText;
    }
    return;
  }
  attribute.integer = rng->Pick(kWild);
  const int64_t heads = c->node.attributes["q_num_heads"].integer;
  const int64_t kv_heads = c->node.attributes["kv_num_heads"].integer;
  if (!LegalHeads(heads, kv_heads)) Judge(&c->create, Verdict::kWrong);
  // Other heads of other widths may fit the same tensors.
  if (heads != c->heads || kv_heads != c->kv_heads) Judge(&c->run, Verdict::kEither);
}

// Another size of one axis. A mask may have other batches, heads and keys, so its are far off.
void DamageSize(Rng* rng, size_t index, AttentionCase* c) {
  auto& dims = c->context.inputs[index]->info.dims;
  int64_t& size = dims[static_cast<size_t>(rng->Below(dims.size()))];
  const int64_t before = size, near = before + (rng->OneIn(2) ? 1 : -1);
  size = index != 3 && rng->OneIn(2) ? near : rng->Pick(kWild);
  if (size == before || (index == 3 && size <= 7)) size = before + 1000;
}

// All tensors agree, and are larger than any memory.
void Enlarge(Rng* rng, AttentionCase* c) {
  c->room = 0;
  if (rng->OneIn(2)) {
    c->batch = 1ll << rng->Between(30, 44);
  } else {
    c->past = 1ll << rng->Between(30, 44);
  }
  c->batch = std::max<int64_t>(c->batch, 1);
  c->queries = std::max<int64_t>(c->queries, 1);
  const std::vector<TensorShapeInfo> shapes = Shapes(rng, *c);
  for (size_t i = 0; i < 6; ++i) {
    c->context.inputs[i]->info = shapes[i];
    c->context.inputs[i]->data = nullptr;  // nothing may read it
  }
  c->what += ", larger than memory";
  Judge(&c->run, Verdict::kWrong);
}

void DamageCall(Rng* rng, AttentionCase* c) {
  auto& inputs = c->context.inputs;
  const size_t index = static_cast<size_t>(rng->Below(6));
  const int64_t kind = rng->Below(6);
  if (kind == 0) return Enlarge(rng, c);
  c->what += ", the call has a wrong input " + std::to_string(index);
  Judge(&c->run, Verdict::kWrong);
  if (kind == 1) return inputs.resize(index);
  if (kind == 2) return inputs[index].reset();
  TensorShapeInfo& info = inputs[index]->info;
  inputs[index]->data = nullptr;  // nothing may read it
  if (kind == 3) {
    info.type = index == 3 || rng->OneIn(2) ? kHalf : kByte;
  } else if (kind == 4) {
    info.dims.resize(static_cast<size_t>(rng->Below(3)));
    if (rng->OneIn(3)) info.dims.assign(40, 1);
  } else {
    DamageSize(rng, index, c);
  }
}

}  // namespace

void MakeAttentionCase(Rng* rng, AttentionCase* out) {
  DrawSizes(rng, out);
  OpAttribute number;
  number.integer = out->heads;
  out->node.attributes["q_num_heads"] = number;
  number.integer = out->kv_heads;
  out->node.attributes["kv_num_heads"] = number;
  number.kind = OpAttribute::kFloat;
  number.real = 0.3f;
  out->node.attributes["scale"] = number;
  for (const TensorShapeInfo& shape : Shapes(rng, *out)) {
    out->context.inputs.push_back(MakeTensor(rng, shape, out));
  }
  out->context.threads = rng->OneIn(50);
  out->context.shares = out->room && rng->OneIn(2);
  if (rng->OneIn(2)) return;
  if (rng->OneIn(2)) DamageCall(rng, out);
  if (rng->OneIn(3)) DamageAttribute(rng, out);
}

}  // namespace qalora_test
