#include "linear.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "buffer.h"
#include "large_pages.h"

namespace qalora {
namespace {

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

constexpr int kRunsBefore = 16;
constexpr int kTurns = 32;

thread_local Buffer workspace;
thread_local Buffer scratch;

// Hands out aligned parts of one allocation: a first pass with base null measures.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<uint8_t*>(base)) {}
  template <class T>
  T* Take(int64_t count) {
    const size_t at = used_;
    used_ += RoundUp(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

// What the tasks of one call share.
struct Call {
  const KernelSet* kernels = nullptr;
  Job job;
  const uint16_t* half_x = nullptr;  // rows of this block, or null
  float* wide_x = nullptr;           // [rows, K]: half_x as floats
  uint16_t* half_y = nullptr;
  int64_t scratch_floats = 0;
  std::atomic<bool> short_of_memory{false};

  float* Scratch() {
    void* memory = scratch.Get(static_cast<size_t>(scratch_floats) * sizeof(float));
    if (!memory) short_of_memory = true;
    return static_cast<float*>(memory);
  }
};

void PrepareTask(void* data, size_t index) {
  Call& call = *static_cast<Call*>(data);
  float* memory = call.Scratch();
  if (!memory) return;
  const int64_t row = static_cast<int64_t>(index), k = call.job.layer->k;
  if (call.half_x) call.kernels->widen(call.half_x + row * k, call.wide_x + row * k, k);
  if (!call.job.float_panels()) call.kernels->prepare(call.job, row, memory);
}

void RunTask(void* data, size_t index) {
  Call& call = *static_cast<Call*>(data);
  float* memory = call.Scratch();
  if (!memory) return;
  const int64_t begin = static_cast<int64_t>(index) * kTaskRows;
  const int64_t end = begin + kTaskRows < call.job.layer->n ? begin + kTaskRows : call.job.layer->n;
  call.kernels->run(call.job, begin, end, memory);
}

// Where the arrays of a block lie in `base`; null measures.
size_t Lay(void* base, const Tensors& tensors, int64_t rows, Call* call, float** bias) {
  Carver carver(base);
  Job& job = call->job;
  const Layer& layer = *job.layer;
  const Plan& plan = job.plan;
  // Panels of floats take x as it is; the last rows of many may still be few.
  const int64_t few = rows < kPanelRows ? rows : kPanelRows - 1;
  const int64_t split = plan.float_panels ? few : rows;
  job.quantized = carver.Take<int8_t>(split * plan.pitch());
  job.block_scale = carver.Take<float>(split * plan.block_floats);
  job.block_sum = carver.Take<float>(few * plan.block_floats);
  job.group_sum = carver.Take<float>(split * plan.group_floats);
  if (tensors.half_x) {
    call->wide_x = carver.Take<float>(rows * layer.k);
    job.y = carver.Take<float>(rows * layer.n);
    if (tensors.bias) *bias = carver.Take<float>(layer.n);
  }
  return carver.used();
}

bool ShortOfMemory(Error* error) {
  std::snprintf(error->text, sizeof error->text, "GroupQuantLinear: not enough memory");
  return false;
}

bool RunBlock(Call* call, const Parallel& parallel, Error* error) {
  const size_t tasks = static_cast<size_t>((call->job.layer->n + kTaskRows - 1) / kTaskRows);
  const bool prepare = call->half_x || !call->job.float_panels();
  const size_t rows = prepare ? static_cast<size_t>(call->job.rows) : 0;
  if ((rows && !parallel.run(parallel.context, PrepareTask, rows, call)) ||
      !parallel.run(parallel.context, RunTask, tasks, call)) {
    std::snprintf(error->text, sizeof error->text, "GroupQuantLinear: the thread pool failed");
    return false;
  }
  if (call->short_of_memory) return ShortOfMemory(error);
  if (call->half_y) {
    call->kernels->narrow(call->job.y, call->half_y, call->job.rows * call->job.layer->n);
  }
  return true;
}

}  // namespace

int64_t ScratchFloats(const Layer& layer, const Plan& plan, int64_t rows) {
  static_assert(sizeof(int32_t) == sizeof(float), "rounded activations lie in the scratch");
  const int64_t prepare = plan.prepared() + 64;
  if (rows < kPanelRows) return prepare;
  // A task's part of y, a panel, and the scales and products of its columns.
  const int64_t y = (rows < kMaxBlockRows ? rows : kMaxBlockRows) * kTaskRows;
  const int64_t columns = RoundUp(layer.n < kTaskRows ? layer.n : kTaskRows, 16);
  const int64_t many = y + 2 * plan.lanes * kFloatPanelCodes + 2 * columns * plan.group_floats;
  return many > prepare ? many : prepare;
}

Linear::~Linear() {
  std::free(memory_);
}

// False where memory is short; the next call tries again.
bool Linear::MakeMaps() const {
  if (made_.load(std::memory_order_acquire)) return true;
  const std::lock_guard<std::mutex> lock(making_);
  if (made_.load(std::memory_order_relaxed)) return true;
  const int64_t lanes = plan_.lanes, vectors = (plan_.blocks + lanes - 1) / lanes;
  const size_t count = static_cast<size_t>(vectors * (1 + lanes) + plan_.block_lanes * lanes);
  auto* first = static_cast<int32_t*>(std::malloc(count * sizeof(int32_t)));
  if (!first) return false;
  int32_t* to = first + vectors;
  blocks_ = {first, to};
  const auto group = [&](int64_t block) {
    const int64_t last = plan_.blocks - 1;
    return static_cast<int32_t>((block < last ? block : last) * layer_.block() / layer_.group_size);
  };
  for (int64_t block = 0; block < vectors * lanes; ++block) {
    if (block % lanes == 0) first[block / lanes] = group(block);
    *to++ = group(block) - first[block / lanes];
  }
  step_blocks_ = to;
  for (int64_t i = 0; i < plan_.block_lanes * lanes; ++i) {
    *to++ = static_cast<int32_t>(i / plan_.block_lanes);
  }
  memory_ = first;
  made_.store(true, std::memory_order_release);
  return true;
}

// To move weights into large pages takes as long as it gains in about 100 runs of few rows. So it waits
// until some have been made, and the layers of a model take turns.
void Linear::CountRun(const Tensors& tensors) const {
  const auto turn = static_cast<int>(reinterpret_cast<uintptr_t>(this) / kAlignment % kTurns);
  const int moves = kRunsBefore + turn;
  if (few_runs_.load(std::memory_order_relaxed) > moves) return;
  if (few_runs_.fetch_add(1, std::memory_order_relaxed) != moves) return;
  const size_t parameter_bytes = tensors.half_parameters ? 2 : 4;
  const size_t parameters = static_cast<size_t>(layer_.n * layer_.groups) * parameter_bytes;
  UseLargePages(tensors.codes, static_cast<size_t>(layer_.n * layer_.row_bytes()));
  UseLargePages(tensors.scale, parameters);
  UseLargePages(tensors.zero_point, parameters);
}

void Linear::Init(const Layer& layer, const KernelSet* kernels) {
  layer_ = layer;
  kernels_ = kernels;
  plan_.digits = layer.digits;
  // A block's sum of three digits and codes of 8 bits does not fit 32 bits.
  const bool fits = layer.digits < 3 || layer.bits < 8;
  plan_.float_panels = layer.digits > kernels->panel_digits || !fits;
  plan_.lanes = kernels->lanes;
  plan_.steps = (layer.low_bytes() + kernels->step_bytes - 1) / kernels->step_bytes;
  plan_.step_codes = kernels->step_bytes * 8 / layer.low_bits();
  plan_.group_floats = RoundUp(layer.groups, 16) + kGroupPadding;
  plan_.blocks = layer.padded_k() / layer.block();
  plan_.block_lanes = layer.block() * layer.low_bits() / 32;
  const int64_t past_row = (kPastRow + layer.row_bytes() - 1) / layer.row_bytes();
  const int64_t past_groups = (kPastGroups + layer.groups - 1) / layer.groups;
  plan_.inside_rows = layer.n - (past_row > past_groups ? past_row : past_groups);
  plan_.block_floats = RoundUp(plan_.blocks, 16) + kGroupPadding;
}

bool Linear::Run(const Tensors& tensors, int64_t rows, const Parallel& parallel,
                 Error* error) const {
  if (rows == 0) return true;
  if (!MakeMaps()) return ShortOfMemory(error);
  Call call;
  call.kernels = kernels_;
  call.scratch_floats = ScratchFloats(layer_, plan_, rows);
  Job& job = call.job;
  job.layer = &layer_;
  job.plan = plan_;
  job.blocks = blocks_;
  job.step_blocks = step_blocks_;
  job.codes = tensors.codes;
  job.scale = tensors.scale;
  job.zero_point = tensors.zero_point;
  job.half_parameters = tensors.half_parameters;
  float* bias = nullptr;
  const int64_t block = rows < kMaxBlockRows ? rows : kMaxBlockRows;
  void* memory = workspace.Get(Lay(nullptr, tensors, block, &call, &bias));
  if (!memory) return ShortOfMemory(error);
  Lay(memory, tensors, block, &call, &bias);
  job.bias = static_cast<const float*>(tensors.bias);
  if (bias) {
    kernels_->widen(static_cast<const uint16_t*>(tensors.bias), bias, layer_.n);
    job.bias = bias;
  }
  if (rows < kPanelRows) CountRun(tensors);
  bool done = true;
  for (int64_t row = 0; done && row < rows; row += block) {
    job.rows = rows - row < block ? rows - row : block;
    if (tensors.half_x) {
      call.half_x = static_cast<const uint16_t*>(tensors.x) + row * layer_.k;
      call.half_y = static_cast<uint16_t*>(tensors.y) + row * layer_.n;
      job.x = call.wide_x;
    } else {
      job.x = static_cast<const float*>(tensors.x) + row * layer_.k;
      job.y = static_cast<float*>(tensors.y) + row * layer_.n;
    }
    done = RunBlock(&call, parallel, error);
  }
  workspace.Shrink();
  return done;
}

}  // namespace qalora
