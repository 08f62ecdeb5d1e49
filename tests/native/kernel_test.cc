// The kernels of every level that this CPU has, against a reference in double.
//
//   kernel_test [--part N] [LEVEL ...]
//
// --part takes every N-th case of the grid, for emulators and sanitizers. Levels that are named have to be there, so that
// none drops out of the test unseen; without names, all that the CPU has are tested, and those with
// emulated instructions.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "attention_test.h"
#include "dispatch.h"
#include "emulated.h"
#include "half_test.h"
#include "large_pages.h"
#include "linear.h"
#include "reference.h"
#include "support.h"

// New memory is full of NaNs under AddressSanitizer: what the library forgets to fill shows.
extern "C" const char* __asan_default_options() {
  return "malloc_fill_byte=255:max_malloc_fill_size=67108864";
}

namespace qalora_test {
namespace {

enum class Mode { kSerial, kNewThread, kThreads };

struct Level {
  const qalora::KernelSet* kernels = nullptr;
  int64_t cases = 0;
  double worst = 0.0;  // of the tolerance, among float32 results
};

// How one case is run.
struct Way {
  Mode mode = Mode::kSerial;
  bool unaligned = false;
};

uint16_t ToHalf(float value) { return std::isnan(value) ? 0x7e00 : NearestHalf(value); }

// A tensor in memory: floats, or the halves with the same values.
Exact Tensor(const std::vector<float>& values, bool half, bool unaligned) {
  const size_t width = half ? sizeof(uint16_t) : sizeof(float);
  std::vector<uint16_t> halves;
  for (size_t i = 0; half && i < values.size(); ++i) halves.push_back(ToHalf(values[i]));
  const void* from = half ? static_cast<const void*>(halves.data()) : values.data();
  return Exact(from, values.size() * width, unaligned ? width : 0);
}

// A case as the library sees it.
struct Memory {
  Exact x, codes, scale, zero_point, bias, y;

  Memory(const Spec& spec, const Data& data, bool unaligned)
      : x(Tensor(data.x, spec.half_x, unaligned)),
        codes(data.codes.data(), data.codes.size(), unaligned ? 1 : 0),
        scale(Tensor(data.scale, spec.half_parameters, unaligned)),
        zero_point(Tensor(data.zero_point, spec.half_parameters, unaligned)),
        bias(Tensor(data.bias, spec.half_x, unaligned)),
        // NaNs, so that an element that is not written shows.
        y(Tensor(std::vector<float>(spec.m * spec.n, NAN), spec.half_x, unaligned)) {}

  qalora::Tensors tensors(const Spec& spec) const {
    qalora::Tensors tensors;
    tensors.x = x.data();
    tensors.codes = codes.data();
    tensors.scale = scale.data();
    tensors.zero_point = zero_point.data();
    tensors.bias = spec.bias ? bias.data() : nullptr;
    tensors.y = y.data();
    tensors.half_x = spec.half_x;
    tensors.half_parameters = spec.half_parameters;
    return tensors;
  }
};

bool Fail(const Level& level, const Spec& spec, const Way& way, const std::string& problem) {
  const char* const modes[] = {"serial", "on a new thread", "on three threads"};
  std::printf("FAILED %s: %s\n  %s, %s: %s\n", level.kernels->name, spec.text().c_str(),
              modes[static_cast<int>(way.mode)], way.unaligned ? "unaligned" : "aligned",
              problem.c_str());
  return false;
}

// Whether element i of y may be what it is; the reference's value is rounded to half where y is.
bool Fits(const Spec& spec, const Memory& memory, const Expected& expected, int64_t i, Level* level,
          std::string* problem) {
  const double wanted = expected.y[i], tolerance = expected.tolerance[i];
  double got, low = wanted - tolerance, high = wanted + tolerance;
  if (spec.half_x) {
    got = HalfValue(reinterpret_cast<const uint16_t*>(memory.y.data())[i]);
    low = HalfValue(NearestHalf(low));
    high = HalfValue(NearestHalf(high));
  } else {
    got = reinterpret_cast<const float*>(memory.y.data())[i];
    const double part = std::fabs(got - wanted) / tolerance;
    if (part > level->worst) level->worst = part;
  }
  if (got >= low && got <= high) return true;
  char text[200];
  std::snprintf(text, sizeof text, "y[%lld, %lld] is %.9g, expected %.9g within %.3g",
                static_cast<long long>(i / spec.n), static_cast<long long>(i % spec.n), got, wanted,
                tolerance);
  *problem = text;
  return false;
}

bool Check(const Spec& spec, const Data& data, const Memory& memory, const Expected& expected,
           const Way& way, Level* level) {
  for (int64_t i = 0; i < spec.m * spec.n; ++i) {
    std::string problem;
    if (data.skip_row[i / spec.n] || data.skip_column[i % spec.n]) {
      const double got = spec.half_x
                             ? HalfValue(reinterpret_cast<const uint16_t*>(memory.y.data())[i])
                             : reinterpret_cast<const float*>(memory.y.data())[i];
      if (!std::isfinite(got)) continue;
      problem = "y[" + std::to_string(i / spec.n) + ", " + std::to_string(i % spec.n) +
                "] is finite, and its row of x or of the weight is not";
    } else if (Fits(spec, memory, expected, i, level, &problem)) {
      continue;
    }
    return Fail(*level, spec, way, problem);
  }
  return true;
}

bool RunLevel(const Spec& spec, const Data& data, const Expected& expected, const Way& way,
              Level* level) {
  qalora::Linear linear;
  linear.Init(spec.layer(), level->kernels);
  const Memory memory(spec, data, way.unaligned);
  qalora::Error error;
  bool done = false;
  const qalora::Parallel parallel{nullptr, way.mode == Mode::kThreads ? RunThreads : RunSerial};
  const auto run = [&] { done = linear.Run(memory.tensors(spec), spec.m, parallel, &error); };
  if (way.mode == Mode::kNewThread) {
    std::thread(run).join();
  } else {
    run();
  }
  if (!done) return Fail(*level, spec, way, error.text);
  ++level->cases;
  return Check(spec, data, memory, expected, way, level);
}

// One case at every level; the way it runs follows from its seed.
bool RunCase(const Spec& spec, std::vector<Level>* levels) {
  const Data data = MakeData(spec);
  const Expected expected = Reference(spec, data);
  Rng rng(spec.seed + 1);
  for (Level& level : *levels) {
    const Way way{static_cast<Mode>(rng.Below(3)), rng.OneIn(2)};
    if (!RunLevel(spec, data, expected, way, &level)) return false;
  }
  return true;
}

constexpr int kBits[] = {2, 3, 4, 8};
constexpr int64_t kLarger = 0;  // stands for a group larger than K
constexpr int64_t kGroups[] = {16, 32, 48, 64, 128, 256, kLarger};
// Around steps of 16 to 256 codes, panels of 256 and 1024, and tails of one code to a whole group.
constexpr int64_t kK[] = {1,   7,   15,  16,  17,  31,  33,  64,   100,  127,
                          128, 250, 257, 512, 515, 769, 960, 1024, 1041, 2101};
constexpr int64_t kN[] = {1, 2, 3, 4, 5, 7, 33, 64, 65, 130};  // tasks take 64 rows, panels up to 32
constexpr int64_t kM[] = {0, 1, 2, 3, 4, 5, 7, 8, 16, 27, 128, 129};

class Grid {
 public:
  Grid(uint64_t part, std::vector<Level>* levels) : levels_(levels), part_(part) {}

  // Every width, group and number of rows with every combination of types; K, N and the kind of
  // values are drawn.
  bool Types() {
    for (const int bits : kBits) {
      for (const int64_t group : kGroups) {
        for (const int64_t m : kM) {
          for (int types = 0; types < 24; ++types) {
            Spec spec;
            spec.bits = bits;
            spec.m = m;
            spec.digits = 1 + types / 8;
            spec.half_x = types & 1;
            spec.half_parameters = types & 2;
            spec.bias = types & 4;
            spec.k = rng_.Pick(kK);
            spec.n = m > 100 && !rng_.OneIn(8) ? rng_.Between(1, 9) : rng_.Pick(kN);
            if (!Run(spec, group)) return false;
          }
        }
      }
    }
    return true;
  }

  // Every width, group, K and N; rows and types are drawn, rows few and many in turn.
  bool Shapes() {
    for (const int bits : kBits) {
      for (const int64_t group : kGroups) {
        for (const int64_t k : kK) {
          for (const int64_t n : kN) {
            Spec spec;
            spec.bits = bits;
            spec.k = k;
            spec.n = n;
            spec.m = rng_.OneIn(2) ? 1 : rng_.Between(2, 27);
            spec.digits = 1 + static_cast<int>(rng_.Below(3));
            spec.half_x = rng_.OneIn(2);
            spec.half_parameters = rng_.OneIn(2);
            spec.bias = rng_.OneIn(2);
            if (!Run(spec, group)) return false;
          }
        }
      }
    }
    return true;
  }

 private:
  bool Run(Spec spec, int64_t group) {
    spec.group = group == kLarger ? (spec.k / 16 + 1 + rng_.Between(0, 3)) * 16 : group;
    spec.values = static_cast<Values>(rng_.Below(8));
    spec.seed = ++count_;
    if (!spec.m) return RunEmpty(spec);
    return count_ % part_ || RunCase(spec, levels_);
  }

  // No rows: nothing is read or written.
  bool RunEmpty(const Spec& spec) {
    for (Level& level : *levels_) {
      qalora::Linear linear;
      qalora::Error error;
      linear.Init(spec.layer(), level.kernels);
      if (!linear.Run(qalora::Tensors{}, 0, qalora::Parallel{nullptr, RunSerial}, &error)) {
        return Fail(level, spec, Way{}, error.text);
      }
      ++level.cases;
    }
    return true;
  }

  std::vector<Level>* levels_;
  Rng rng_{1};
  uint64_t count_ = 0, part_;
};

// A workspace above the size that a thread keeps between calls, and a call after it.
bool TestLargeWorkspace(std::vector<Level>* levels) {
  for (const int digits : {1, 2, 3}) {
    Spec spec;
    spec.m = 129;
    spec.k = 6150;
    spec.n = 3;
    spec.digits = digits;
    spec.half_x = true;
    if (!RunCase(spec, levels)) return false;
    spec.m = 1;
    if (!RunCase(spec, levels)) return false;
  }
  return true;
}

// A runner that fails is an error of the call.
bool TestFailingRunner(const Level& level) {
  Spec spec;
  const Data data = MakeData(spec);
  const Memory memory(spec, data, false);
  const auto fail = [](void*, Task, size_t, void*) { return false; };
  qalora::Linear linear;
  qalora::Error error;
  linear.Init(spec.layer(), level.kernels);
  if (!linear.Run(memory.tensors(spec), 1, qalora::Parallel{nullptr, fail}, &error) &&
      std::strncmp(error.text, "GroupQuantLinear: ", 18) == 0) {
    return true;
  }
  return Fail(level, spec, Way{}, "a runner that fails is no error");
}

// Memory that is moved into large pages keeps what it holds, also where it ends within a page.
bool TestLargePages() {
  const size_t sizes[] = {1, 70000, size_t{5} << 20};
  for (const size_t bytes : sizes) {
    const Exact memory(nullptr, bytes, 3);
    for (size_t i = 0; i < bytes; ++i) memory.data()[i] = static_cast<uint8_t>(i * 31 >> 3);
    qalora::UseLargePages(memory.data(), bytes);
    qalora::UseLargePages(memory.data() + bytes / 2, bytes - bytes / 2);
    for (size_t i = 0; i < bytes; ++i) {
      if (memory.data()[i] == static_cast<uint8_t>(i * 31 >> 3)) continue;
      std::printf("FAILED: byte %zu of %zu changes in large pages\n", i, bytes);
      return false;
    }
  }
  return true;
}

std::vector<std::string> AllLevels() {
  std::vector<std::string> all = EmulatedNames();
  std::istringstream names(qalora::KernelNames());
  for (std::string name; std::getline(names, name, ',');) all.push_back(name);
  return all;
}

int Main(uint64_t part, const std::vector<std::string>& names) {
  const bool quick = part > 1;
  std::vector<Level> levels;
  for (const std::string& name : names) {
    levels.emplace_back();
    levels.back().kernels = FindLevel(name.c_str());
    if (!levels.back().kernels) {
      std::printf("FAILED: no level %s, only %s\n", name.c_str(), qalora::KernelNames());
      return 1;
    }
    if (!TestFailingRunner(levels.back())) return 1;
  }
  if (!TilesAreChecked()) {
    std::printf("FAILED: the check of AMX tiles passes wrong ones, or fails right ones\n");
    return 1;
  }
  if (*qalora::KernelNote()) std::printf("NOTE: %s\n", qalora::KernelNote());
  if (!TestLargePages()) return 1;
  int64_t checks = 0;
  if (!TestHalf(quick, &checks)) return 1;
  std::printf("half: %lld conversions\n", static_cast<long long>(checks));
  int64_t attentions = 0;
  for (const Level& level : levels) {
    if (!TestAttention(*level.kernels, quick, &attentions)) return 1;
  }
  std::printf("attention: %lld cases\n", static_cast<long long>(attentions));
  Grid grid(part, &levels);
  if (!TestLargeWorkspace(&levels) || !grid.Types() || !grid.Shapes()) return 1;
  for (const Level& level : levels) {
    std::printf("%s: %lld cases, worst error %.3g of the tolerance\n", level.kernels->name,
                static_cast<long long>(level.cases), level.worst);
  }
  return 0;
}

}  // namespace
}  // namespace qalora_test

int main(int argc, char** argv) {
  uint64_t part = 1;
  std::vector<std::string> levels;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--part") == 0 && i + 1 < argc) {
      part = std::strtoull(argv[++i], nullptr, 10);
    } else {
      levels.push_back(argv[i]);
    }
  }
  if (!part) {
    std::printf("FAILED: --part needs a number above 0\n");
    return 1;
  }
  return qalora_test::Main(part, levels.empty() ? qalora_test::AllLevels() : levels);
}
