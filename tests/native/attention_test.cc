#include "attention_test.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "attention.h"
#include "support.h"

namespace qalora_test {
namespace {

using qalora::AttentionJob;
using qalora::AttentionShape;

constexpr int64_t kWidths[] = {1, 3, 8, 16, 17, 33, 64, 80, 128};
constexpr int64_t kQueries[] = {0, 1, 1, 1, 2, 3, 5, 9, 33};
constexpr int64_t kPasts[] = {0, 1, 4, 63, 64, 65, 130, 200};

struct Case {
  AttentionShape shape;
  std::vector<float> q, k, v, past_key, past_value, float_mask;
  std::vector<uint8_t> bool_mask;
  bool shared = false;  // the present buffers are the past ones
  int masked_like = 0;  // 0: none masked, 1: later keys, 2: at random, 3: all keys of some rows
};

std::vector<float> Floats(Rng* rng, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(2 * rng->Uniform());
  return values;
}

void MakeMask(Rng* rng, Case* c) {
  AttentionShape& shape = c->shape;
  const int64_t lines = shape.mask_batch * shape.mask_heads * shape.queries;
  if (!shape.bool_mask) {
    c->float_mask = Floats(rng, lines * shape.total());
    return;
  }
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t last = shape.past + line % shape.queries;
    for (int64_t t = 0; t < shape.total(); ++t) {
      const bool kept = c->masked_like == 1   ? t <= last
                        : c->masked_like == 2 ? !rng->OneIn(3)
                                              : c->masked_like == 0 || line % 2;
      c->bool_mask.push_back(kept);
    }
  }
}

Case MakeCase(Rng* rng) {
  Case c;
  AttentionShape& shape = c.shape;
  shape.batch = rng->Between(1, 2);
  shape.kv_heads = rng->Between(1, 3);
  shape.heads = shape.kv_heads * rng->Between(1, 9);
  shape.queries = rng->Pick(kQueries);
  shape.past = rng->Pick(kPasts);
  const bool room = rng->OneIn(2) && shape.queries;
  c.shared = room && rng->OneIn(2);
  shape.past_rows = room ? shape.total() + rng->Between(0, 70) : shape.past;
  shape.present_rows = room ? shape.past_rows : shape.total();
  shape.width = rng->Pick(kWidths);
  shape.value_width = rng->OneIn(2) ? shape.width : rng->Pick(kWidths);
  shape.mask_batch = rng->OneIn(2) ? 1 : shape.batch;
  shape.mask_heads = rng->OneIn(2) ? 1 : shape.heads;
  shape.bool_mask = rng->OneIn(2);
  c.masked_like = static_cast<int>(rng->Below(4));
  const int64_t lines = shape.batch * shape.queries, kept = shape.batch * shape.kv_heads * shape.past_rows;
  c.q = Floats(rng, lines * shape.heads * shape.width);
  c.k = Floats(rng, lines * shape.kv_heads * shape.width);
  c.v = Floats(rng, lines * shape.kv_heads * shape.value_width);
  c.past_key = Floats(rng, kept * shape.width);
  c.past_value = Floats(rng, kept * shape.value_width);
  MakeMask(rng, &c);
  return c;
}

// Element i of row t of one head's keys or values.
float CacheAt(const AttentionShape& shape, const std::vector<float>& past,
              const std::vector<float>& fresh, int64_t width, int64_t batch, int64_t head, int64_t t,
              int64_t i) {
  if (t < shape.past) {
    const int64_t row = (batch * shape.kv_heads + head) * shape.past_rows + t;
    return past[static_cast<size_t>(row * width + i)];
  }
  const int64_t row = (batch * shape.queries + t - shape.past) * shape.kv_heads + head;
  return fresh[static_cast<size_t>(row * width + i)];
}

// The weights of the keys for one row of queries.
std::vector<double> Weights(const Case& c, int64_t batch, int64_t query, int64_t head, float scale) {
  const AttentionShape& shape = c.shape;
  const int64_t row = (batch * shape.queries + query) * shape.heads + head;
  const int64_t mask_batch = shape.mask_batch > 1 ? batch : 0;
  const int64_t mask_head = shape.mask_heads > 1 ? head : 0;
  const int64_t line = (mask_batch * shape.mask_heads + mask_head) * shape.queries + query;
  std::vector<double> scores;
  double largest = -HUGE_VAL, sum = 0;
  for (int64_t t = 0; t < shape.total(); ++t) {
    double score = 0;
    for (int64_t i = 0; i < shape.width; ++i) {
      score += static_cast<double>(c.q[static_cast<size_t>(row * shape.width + i)]) *
               CacheAt(shape, c.past_key, c.k, shape.width, batch, head / shape.sharing(), t, i);
    }
    const auto at = static_cast<size_t>(line * shape.total() + t);
    score = !shape.bool_mask    ? score * scale + c.float_mask[at]
            : c.bool_mask[at] ? score * scale
                              : -3e38;
    scores.push_back(score);
    largest = score > largest ? score : largest;
  }
  const bool none = shape.bool_mask && largest < -1e38;
  for (double& score : scores) sum += score = none ? 0 : std::exp(score - largest);
  if (none) return scores;
  for (double& score : scores) score /= sum;
  return scores;
}

bool CheckResult(const Case& c, const float* y, float scale, std::string* problem) {
  const AttentionShape& shape = c.shape;
  for (int64_t row = 0; row < shape.batch * shape.queries * shape.heads; ++row) {
    const int64_t head = row % shape.heads, query = row / shape.heads % shape.queries;
    const int64_t batch = row / shape.heads / shape.queries;
    const std::vector<double> weights = Weights(c, batch, query, head, scale);
    for (int64_t i = 0; i < shape.value_width; ++i) {
      double wanted = 0;
      for (int64_t t = 0; t < shape.total(); ++t) {
        wanted += weights[static_cast<size_t>(t)] *
                  CacheAt(shape, c.past_value, c.v, shape.value_width, batch,
                          head / shape.sharing(), t, i);
      }
      const double got = y[row * shape.value_width + i];
      if (std::fabs(got - wanted) <= 1e-5) continue;
      *problem = "y is " + std::to_string(got) + ", expected " + std::to_string(wanted);
      return false;
    }
  }
  return true;
}

bool CheckPresent(const Case& c, const std::vector<float>& past, const std::vector<float>& fresh,
                  int64_t width, const float* present) {
  const AttentionShape& shape = c.shape;
  for (int64_t row = 0; row < shape.batch * shape.kv_heads * shape.total(); ++row) {
    const int64_t head = row / shape.total();
    for (int64_t i = 0; i < width; ++i) {
      const float wanted = CacheAt(shape, past, fresh, width, head / shape.kv_heads,
                                   head % shape.kv_heads, row % shape.total(), i);
      const int64_t at = head * shape.present_rows + row % shape.total();
      if (present[at * width + i] != wanted) return false;
    }
  }
  return true;
}

Exact Copy(const std::vector<float>& values, size_t offset) {
  return Exact(values.data(), values.size() * sizeof(float), offset);
}

std::string RunCase(const qalora::KernelSet& level, const Case& c, size_t offset, bool threads) {
  const AttentionShape& shape = c.shape;
  const auto nans = [](int64_t count) { return std::vector<float>(static_cast<size_t>(count), NAN); };
  const int64_t kept = shape.batch * shape.kv_heads * shape.present_rows;
  const Exact q = Copy(c.q, offset), k = Copy(c.k, offset), v = Copy(c.v, offset),
              past_key = Copy(c.past_key, offset), past_value = Copy(c.past_value, offset),
              float_mask = Copy(c.float_mask, offset),
              bool_mask(c.bool_mask.data(), c.bool_mask.size(), offset),
              y = Copy(nans(shape.batch * shape.queries * shape.heads * shape.value_width), offset),
              present_key = Copy(nans(kept * shape.width), offset),
              present_value = Copy(nans(kept * shape.value_width), offset);
  const auto floats = [](const Exact& memory) { return reinterpret_cast<float*>(memory.data()); };
  AttentionJob job;
  job.shape = shape;
  job.scale = 0.3f;
  job.q = floats(q);
  job.k = floats(k);
  job.v = floats(v);
  job.mask = shape.bool_mask ? bool_mask.data() : float_mask.data();
  job.past_key = floats(past_key);
  job.past_value = floats(past_value);
  job.y = floats(y);
  job.present_key = floats(c.shared ? past_key : present_key);
  job.present_value = floats(c.shared ? past_value : present_value);
  qalora::Error error;
  const qalora::Parallel parallel{nullptr, threads ? RunThreads : RunSerial};
  if (!qalora::RunAttention(job, level, parallel, &error)) return error.text;
  if (!CheckPresent(c, c.past_key, c.k, shape.width, job.present_key)) return "wrong keys";
  if (!CheckPresent(c, c.past_value, c.v, shape.value_width, job.present_value)) {
    return "wrong values";
  }
  std::string problem;
  CheckResult(c, job.y, job.scale, &problem);
  return problem;
}

// What is not finite in a query, a key or a value shows in the rows that read it.
bool TestNotFinite(const qalora::KernelSet& level) {
  for (const float bad : {NAN, HUGE_VALF, -HUGE_VALF}) {
    for (int which = 0; which < 2; ++which) {
      AttentionJob job;
      job.shape.batch = job.shape.heads = job.shape.kv_heads = job.shape.mask_batch = 1;
      job.shape.mask_heads = 1;
      job.shape.queries = job.shape.present_rows = 1;
      job.shape.width = job.shape.value_width = 2;
      job.shape.bool_mask = true;
      const float fine[] = {1, 2};
      const float wrong[] = {bad, 2};
      const uint8_t mask[] = {1};
      float y[2], keys[2], values[2];
      job.q = which == 0 ? wrong : fine;
      job.k = fine;
      job.v = which == 1 ? wrong : fine;
      job.mask = mask;
      job.y = y;
      job.present_key = keys;
      job.present_value = values;
      qalora::Error error;
      const qalora::Parallel parallel{nullptr, RunSerial};
      if (!qalora::RunAttention(job, level, parallel, &error) || std::isfinite(y[0])) {
        std::printf("FAILED %s: attention hides %g in input %d\n", level.name,
                    static_cast<double>(bad), which);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

bool TestAttention(const qalora::KernelSet& level, bool quick, int64_t* cases) {
  Rng rng(7);
  for (int64_t i = 0; i < (quick ? 40 : 300); ++i, ++*cases) {
    const Case c = MakeCase(&rng);
    const std::string problem = RunCase(level, c, rng.OneIn(2) ? sizeof(float) : 0, rng.OneIn(4));
    if (problem.empty()) continue;
    const AttentionShape& s = c.shape;
    std::printf("FAILED %s: attention of %lld, heads %lld/%lld, %lld queries, past %lld, widths "
                "%lld/%lld, mask %d/%d: %s\n",
                level.name, static_cast<long long>(s.batch), static_cast<long long>(s.heads),
                static_cast<long long>(s.kv_heads), static_cast<long long>(s.queries),
                static_cast<long long>(s.past), static_cast<long long>(s.width),
                static_cast<long long>(s.value_width), s.bool_mask, c.masked_like,
                problem.c_str());
    return false;
  }
  return TestNotFinite(level);
}

}  // namespace qalora_test
