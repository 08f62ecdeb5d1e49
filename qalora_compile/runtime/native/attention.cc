#include "attention.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

#include "buffer.h"
#include "describe.h"

namespace qalora {
namespace {

constexpr int64_t kMostHeads = int64_t{1} << 20;
// Of an axis: sums of them stay far from overflow.
constexpr int64_t kMostSize = int64_t{1} << 40;
// Rows of queries of one head that are computed in the pass that also copies the keys; more are
// computed afterwards, in tasks.
constexpr int64_t kFewQueries = 2 * kAttentionTile;
// Rows of queries that one task takes.
constexpr int64_t kTaskQueries = 8 * kAttentionTile;
const char* const kNames[kAttentionInputs] = {"q", "k", "v", "mask", "past_key", "past_value"};

thread_local Buffer scratch;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
bool Fail(Error* error, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int used = std::snprintf(error->text, sizeof error->text, "CachedAttention: ");
  std::vsnprintf(error->text + used, sizeof error->text - used, format, arguments);
  va_end(arguments);
  return false;
}

bool CheckTypes(const TensorInfo (&inputs)[kAttentionInputs], Error* error) {
  for (int i = 0; i < kAttentionInputs; ++i) {
    const Type type = inputs[i].type;
    if (!inputs[i].present) return Fail(error, "input %d (%s) is missing", i, kNames[i]);
    if (type == Type::kFloat32 || (i == 3 && type == Type::kBool)) continue;
    return Fail(error, "input %d (%s) is %s, expected float32%s", i, kNames[i], TypeName(type),
                i == 3 ? " or bool" : "");
  }
  return true;
}

bool CheckShape(const TensorInfo (&inputs)[kAttentionInputs], int index, int64_t rank,
                const int64_t* dims, Error* error) {
  const TensorInfo& input = inputs[index];
  TensorInfo wanted;
  wanted.rank = rank;
  bool fits = input.rank == rank;
  for (int64_t i = 0; i < rank; ++i) {
    wanted.dims[i] = dims[i];
    fits = fits && input.dims[i] == dims[i];
  }
  if (fits) return true;
  return Fail(error, "input %d (%s) has shape %s, expected %s", index, kNames[index],
              ShapeText(input).text, ShapeText(wanted).text);
}

bool CheckSizes(const TensorInfo (&inputs)[kAttentionInputs], Error* error) {
  for (int i = 0; i < kAttentionInputs; ++i) {
    const int64_t rank = i < 3 ? 3 : 4;
    if (inputs[i].rank != rank) {
      return Fail(error, "input %d (%s) has shape %s, expected %lld axes", i, kNames[i],
                  ShapeText(inputs[i]).text, static_cast<long long>(rank));
    }
    for (int64_t axis = 0; axis < rank; ++axis) {
      if (inputs[i].dims[axis] >= 0 && inputs[i].dims[axis] <= kMostSize) continue;
      return Fail(error, "input %d (%s) has shape %s, which no tensor in memory has", i, kNames[i],
                  ShapeText(inputs[i]).text);
    }
  }
  return true;
}

// A width of one head: `input`'s last axis divided by its heads.
bool HeadWidth(const TensorInfo (&inputs)[kAttentionInputs], int index, int64_t heads,
               int64_t* width, Error* error) {
  const int64_t all = inputs[index].dims[2];
  *width = all / heads;
  if (all > 0 && all % heads == 0) return true;
  return Fail(error, "input %d (%s) has shape %s, expected a multiple of %lld heads", index,
              kNames[index], ShapeText(inputs[index]).text, static_cast<long long>(heads));
}

struct Call {
  const AttentionJob* job = nullptr;
  const KernelSet* kernels = nullptr;
  int64_t rows = 0;       // of queries that a task takes; 0: it only copies
  int64_t row_tasks = 1;  // of one head
  bool append = false;
  std::atomic<bool> short_of_memory{false};
};

void Task(void* data, size_t index) {
  Call& call = *static_cast<Call*>(data);
  const AttentionShape& shape = call.job->shape;
  const auto floats = static_cast<size_t>(AttentionScratchFloats(shape));
  auto* memory = static_cast<float*>(scratch.Get(floats * sizeof(float)));
  if (!memory) {
    call.short_of_memory = true;
    return;
  }
  const int64_t head = static_cast<int64_t>(index) / call.row_tasks;
  AttentionPart part;
  part.batch = head / shape.kv_heads;
  part.kv_head = head % shape.kv_heads;
  part.begin = static_cast<int64_t>(index) % call.row_tasks * call.rows;
  const int64_t end = part.begin + call.rows;
  part.end = end < shape.rows() ? end : shape.rows();
  if (call.rows == 0) part.end = part.begin;
  part.append = call.append;
  part.appended = !call.append;
  call.kernels->attend(*call.job, part, memory);
  scratch.Shrink();
}

bool Run(Call* call, const Parallel& parallel, Error* error) {
  const AttentionShape& shape = call->job->shape;
  const auto tasks = static_cast<size_t>(shape.batch * shape.kv_heads * call->row_tasks);
  if (tasks && !parallel.run(parallel.context, Task, tasks, call)) {
    return Fail(error, "the thread pool failed");
  }
  return call->short_of_memory ? Fail(error, "not enough memory") : true;
}

}  // namespace

int64_t AttentionScratchFloats(const AttentionShape& shape) {
  const int64_t width = shape.total() + shape.width + shape.value_width + 128;
  return kAttentionTile * width;
}

bool CheckAttention(const AttentionAttributes& attributes, Error* error) {
  const int64_t heads = attributes.heads, kv_heads = attributes.kv_heads;
  if (heads < 1 || heads > kMostHeads || kv_heads < 1 || heads % kv_heads) {
    return Fail(error,
                "attributes q_num_heads and kv_num_heads are %lld and %lld, expected 1 to %lld and a "
                "divisor of it",
                static_cast<long long>(heads), static_cast<long long>(kv_heads),
                static_cast<long long>(kMostHeads));
  }
  return true;
}

bool CheckAttentionInputs(const AttentionAttributes& attributes,
                          const TensorInfo (&inputs)[kAttentionInputs], AttentionShape* shape,
                          Error* error) {
  if (!CheckTypes(inputs, error) || !CheckSizes(inputs, error)) return false;
  shape->heads = attributes.heads;
  shape->kv_heads = attributes.kv_heads;
  if (!HeadWidth(inputs, 0, shape->heads, &shape->width, error) ||
      !HeadWidth(inputs, 2, shape->kv_heads, &shape->value_width, error)) {
    return false;
  }
  const int64_t batch = shape->batch = inputs[0].dims[0];
  const int64_t queries = shape->queries = inputs[0].dims[1];
  const int64_t rows = shape->past_rows = inputs[4].dims[2];
  const int64_t k[] = {batch, queries, shape->kv_heads * shape->width};
  const int64_t v[] = {batch, queries, shape->kv_heads * shape->value_width};
  const int64_t past_key[] = {batch, shape->kv_heads, rows, shape->width};
  const int64_t past_value[] = {batch, shape->kv_heads, rows, shape->value_width};
  shape->mask_batch = inputs[3].dims[0] == 1 ? 1 : batch;
  shape->mask_heads = inputs[3].dims[1] == 1 ? 1 : shape->heads;
  shape->bool_mask = inputs[3].type == Type::kBool;
  // A mask for fewer keys says that the past is a buffer with room for the new ones.
  const int64_t keys = inputs[3].dims[3];
  const bool shared = keys >= queries && keys <= rows;
  shape->past = shared ? keys - queries : rows;
  shape->present_rows = shared ? rows : rows + queries;
  const int64_t mask[] = {shape->mask_batch, shape->mask_heads, queries, shape->total()};
  return CheckShape(inputs, 1, 3, k, error) && CheckShape(inputs, 2, 3, v, error) &&
         CheckShape(inputs, 4, 4, past_key, error) && CheckShape(inputs, 5, 4, past_value, error) &&
         CheckShape(inputs, 3, 4, mask, error);
}

bool RunAttention(const AttentionJob& job, const KernelSet& kernels, const Parallel& parallel,
                  Error* error) {
  const AttentionShape& shape = job.shape;
  if (shape.batch == 0) return true;
  Call call;
  call.job = &job;
  call.kernels = &kernels;
  call.append = true;
  if (shape.rows() <= kFewQueries) {
    call.rows = shape.rows();
    return Run(&call, parallel, error);
  }
  if (!Run(&call, parallel, error)) return false;
  Call queries;
  queries.job = &job;
  queries.kernels = &kernels;
  queries.rows = kTaskQueries;
  queries.row_tasks = (shape.rows() + kTaskQueries - 1) / kTaskQueries;
  return Run(&queries, parallel, error);
}

}  // namespace qalora
