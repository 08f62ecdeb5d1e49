// Malformed and borderline nodes and calls, through the interface that ONNX Runtime uses.
//
// fuzz [SEED [CASES]]: each case makes a node, lets the library infer its shape, create its kernel
// and run it, half of them while a call of the runtime or an allocation fails. A legal case has to
// succeed and a wrong one to end in a status that says so; in all of them nothing may crash, leak
// or write elsewhere (the sanitizers watch that).

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <thread>
#include <type_traits>

#include "attention_op.h"
#include "dispatch.h"
#include "emulated.h"
#include "failing_memory.h"
#include "fake_runtime.h"
#include "fuzz_attention.h"
#include "fuzz_case.h"
#include "op.h"

// ChooseKernels, to which the linker adds the emulated levels.
extern "C" const qalora::KernelSet* __real__ZN6qalora13ChooseKernelsEPNS_5ErrorE(qalora::Error*);
extern "C" const qalora::KernelSet* __wrap__ZN6qalora13ChooseKernelsEPNS_5ErrorE(
    qalora::Error* error) {
  const char* forced = std::getenv("QALORA_KERNEL");
  const qalora::KernelSet* level = forced ? qalora_test::FindLevel(forced) : nullptr;
  return level ? level : __real__ZN6qalora13ChooseKernelsEPNS_5ErrorE(error);
}

namespace qalora_test {
namespace {

using namespace qalora::ort;

constexpr const char* kOurs[] = {"GroupQuantLinear: ", "CachedAttention: "};
// What a kernel may take before it runs, whatever the node and its stated shapes say: far below what
// the sizes of MakeHuge would ask for, and above what a static C library takes for itself once.
constexpr int64_t kMostOfAKernel = int64_t{1} << 20;

// What fails from outside while a case runs.
enum class Fault { kNone, kCall, kMemory };

struct Counts {
  int64_t legal = 0, wrong = 0, faults = 0, inferred = 0;
};

class Fuzzer {
 public:
  Fuzzer(uint64_t seed, const Domain& domain) : seed_(seed), domain_(domain) {
    levels_ = EmulatedNames();
    std::istringstream names(qalora::KernelNames());
    for (std::string name; std::getline(names, name, ',');) levels_.push_back(name);
    levels_.push_back("");  // unset
  }

  bool Run(int64_t number) {
    Rng rng(seed_ * 1000003 + static_cast<uint64_t>(number));
    if (rng.OneIn(3)) {
      AttentionCase c;
      MakeAttentionCase(&rng, &c);
      return RunCase(&rng, number, &c, domain_.ops[qalora::kOpVariants + c.variant()]);
    }
    FuzzCase c;
    MakeCase(&rng, &c);
    return RunCase(&rng, number, &c, domain_.ops[c.variant()]);
  }

  const Counts& counts() const { return counts_; }

 private:
  template <class Case>
  bool RunCase(Rng* random, int64_t number, Case* drawn, const CustomOp* op) {
    Rng& rng = *random;
    Case& c = *drawn;
    ChooseLevel(&rng, &c);
    fault_ = rng.OneIn(4) ? Fault::kCall : rng.OneIn(6) ? Fault::kMemory : Fault::kNone;
    const int64_t before = Alive();
    // Twice: what an injected fault leaves behind must not disturb the next try.
    for (int attempt = 0; attempt < (fault_ == Fault::kNone ? 1 : 2); ++attempt) {
      if (attempt) fault_ = Fault::kNone;
      std::string problem;
      if constexpr (std::is_same_v<Case, FuzzCase>) problem = Infer(&rng, c);
      if (problem.empty()) problem = CreateAndRun(&rng, &c, op);
      Disarm();
      if (problem.empty() && Alive() != before) problem = "something was not released";
      if (problem.empty()) continue;
      std::printf("FAILED case %lld of seed %llu (%s): %s\n", static_cast<long long>(number),
                  static_cast<unsigned long long>(seed_), c.what.c_str(), problem.c_str());
      return false;
    }
    return true;
  }

  template <class Case>
  void ChooseLevel(Rng* rng, Case* c) {
    std::string level = levels_[static_cast<size_t>(rng->Below(levels_.size()))];
    if (rng->OneIn(200)) {
      level = rng->OneIn(2) ? "avx1024" : std::string(3000, '%');
      c->what += ", an unknown level";
      c->create = Verdict::kWrong;
    }
    setenv("QALORA_KERNEL", level.c_str(), 1);
  }

  // Counted from each step's start, so that faults reach late calls as well as early ones.
  void Arm(Rng* rng, int64_t calls) {
    if (fault_ == Fault::kCall) FailCall(rng->Below(calls));
    if (fault_ == Fault::kMemory) FailAllocation(rng->Below(4));
    if (fault_ != Fault::kNone) ++counts_.faults;
  }
  static void Disarm() {
    FailCall(-1);
    FailAllocation(-1);
  }

  // Releases the status. Whether its text is the library's, or one that it may pass on.
  bool Explains(Status* status) const {
    const std::string text = status->text;
    Release(status);
    for (const char* ours : kOurs) {
      if (text.rfind(ours, 0) == 0) return text.size() > std::strlen(ours);
    }
    return text == kTooLarge || (fault_ == Fault::kCall && text == kInjected);
  }

  // "" where the outcome is one that the verdict allows.
  std::string Outcome(const char* step, Status* status, Verdict verdict) {
    const std::string text = status ? status->text : "success";
    if (status && !Explains(status)) return std::string(step) + " gives the status: " + text;
    if (status && verdict == Verdict::kLegal && fault_ == Fault::kNone) {
      return std::string(step) + " refuses what is legal: " + text;
    }
    if (!status && verdict == Verdict::kWrong && fault_ != Fault::kCall) {
      return std::string(step) + " takes what is wrong";
    }
    (status ? counts_.wrong : counts_.legal) += 1;
    return "";
  }

  std::string Infer(Rng* rng, const FuzzCase& c) {
    const CustomOp* op = domain_.ops[rng->Below(qalora::kOpVariants)];  // any: they infer alike
    InferContext context;
    context.node = &c.node;
    Arm(rng, 12);
    Status* status = op->InferOutputShapeFn(op, &context);
    Disarm();
    if (status) return "a status from the inference of shapes, which the runtime drops";
    counts_.inferred += context.stated;
    TensorShapeInfo wanted;
    const bool known = Inferable(c, &wanted);
    if (!context.stated) return known && fault_ == Fault::kNone ? "no shape was inferred" : "";
    const TensorShapeInfo& got = context.output;
    const bool same = known && got.type == wanted.type && got.dims == wanted.dims &&
                      got.names == wanted.names;
    return same ? "" : "a wrong shape was inferred";
  }

  // The output's shape, as far as the node and its first input tell it.
  static bool Inferable(const FuzzCase& c, TensorShapeInfo* wanted) {
    const auto n = c.node.attributes.find("N");
    if (n == c.node.attributes.end() || n->second.kind != OpAttribute::kInt) return false;
    if (n->second.integer < 1 || c.node.inputs.empty() || !c.node.inputs[0]) return false;
    if (!c.node.inputs[0]->is_tensor) return false;
    *wanted = c.node.inputs[0]->tensor;
    if (wanted->dims.empty() || wanted->dims.size() > 16) return false;
    wanted->names.resize(wanted->dims.size());
    wanted->dims.back() = n->second.integer;
    wanted->names.back().clear();
    for (size_t i = 0; i < wanted->dims.size(); ++i) {
      if (wanted->dims[i] < 0 && wanted->names[i].empty()) return false;
    }
    return true;
  }

  template <class Case>
  std::string CreateAndRun(Rng* rng, Case* c, const CustomOp* op) {
    void* kernel = nullptr;
    Arm(rng, 30);
    TakeAskedFor();
    Status* status = op->CreateKernelV2(op, Runtime("1.32.0")->GetApi(18), &c->node, &kernel);
    Disarm();
    const int64_t asked = TakeAskedFor();
    if (asked > kMostOfAKernel) return "creation asks for " + std::to_string(asked) + " bytes";
    if ((status == nullptr) != (kernel != nullptr)) return "a kernel with a status, or neither";
    std::string problem = Outcome("creation", status, c->create);
    if (!kernel) return problem;
    if (problem.empty()) problem = Compute(rng, c, op, kernel);
    op->KernelDestroy(kernel);
    return problem;
  }

  template <class Case>
  std::string Compute(Rng* rng, Case* c, const CustomOp* op, void* kernel) {
    for (auto& memory : c->context.memory) memory.reset();
    Status* status = nullptr;
    Arm(rng, 40);
    const auto run = [&] { status = op->KernelComputeV2(kernel, &c->context); };
    if (rng->OneIn(50) || fault_ == Fault::kMemory) {
      const SafeMemory making_the_thread;  // a static link sends its memory here too
      std::thread(run).join();             // a thread's first call has to allocate
    } else {
      run();
    }
    Disarm();
    const bool success = !status;
    const std::string problem = Outcome("the call", status, c->run);
    if (!problem.empty() || !success) return problem;
    const size_t outputs = std::is_same_v<Case, FuzzCase> || c->context.shares ? 1 : 3;
    const size_t width = c->context.inputs[0]->info.type == kHalf ? 2 : 4;
    bool written = true;
    for (size_t i = 0; i < outputs; ++i) written &= Written(c->context.memory[i].get(), width);
    return written ? "" : "an element of the output was not written, or is not finite";
  }

  static bool Written(const Exact* memory, size_t width) {
    if (!memory) return false;
    const uint8_t* at = memory->data();
    for (size_t i = 0; i < memory->bytes(); i += width) {
      uint32_t bits = 0;
      std::memcpy(&bits, at + i, width);
      const uint32_t exponent = width == 2 ? 0x7c00 : 0x7f800000;
      if ((bits & exponent) == exponent) return false;
    }
    return true;
  }

  const uint64_t seed_;
  const Domain& domain_;
  std::vector<std::string> levels_;
  Fault fault_ = Fault::kNone;
  Counts counts_;
};

// A runtime whose call `number` fails while the library makes its domain: an error, and again one
// when the next session asks. In a process of its own, as the library keeps what came of it.
bool DomainFails(int64_t number) {
  const pid_t child = fork();
  if (child == 0) {
    SessionOptions options;
    FailCall(number);
    Status* first = RegisterCustomOps(&options, Runtime("1.32.0"));
    FailCall(-1);
    Status* second = RegisterCustomOps(&options, Runtime("1.32.0"));
    _exit(first && second && !options.domain ? 0 : 1);
  }
  int result = 1;
  return child > 0 && waitpid(child, &result, 0) == child && result == 0;
}

// What the two variants of CachedAttention, which follow the four of GroupQuantLinear, say.
bool AttentionDescribesItself(const Domain& domain) {
  for (size_t variant = 0; variant < qalora::kAttentionVariants; ++variant) {
    const CustomOp* op = domain.ops[qalora::kOpVariants + variant];
    if (std::strcmp(op->GetName(op), "CachedAttention") != 0) return false;
    if (op->GetInputTypeCount(op) != 6 || op->GetOutputTypeCount(op) != 3) return false;
    for (size_t i = 0; i < 6; ++i) {
      if (op->GetInputType(op, i) != (i == 3 && !variant ? kBool : kFloat)) return false;
      if (op->GetInputCharacteristic(op, i) != kRequired) return false;
    }
  }
  return true;
}

// What the variants say about themselves.
bool DescribesItself(const Domain& domain) {
  if (domain.ops.size() != qalora::kOpVariants + qalora::kAttentionVariants) return false;
  for (size_t variant = 0; variant < qalora::kOpVariants; ++variant) {
    const CustomOp* op = domain.ops[variant];
    const ElementType x = variant & 1 ? kHalf : kFloat, parameter = variant & 2 ? kHalf : kFloat;
    const ElementType types[] = {x, kByte, parameter, parameter, x};
    if (std::strcmp(op->GetName(op), "GroupQuantLinear") != 0) return false;
    if (op->GetInputTypeCount(op) != 5 || op->GetOutputTypeCount(op) != 1) return false;
    if (op->GetOutputType(op, 0) != x) return false;
    if (op->GetOutputCharacteristic(op, 0) != kRequired) return false;
    for (size_t i = 0; i < 5; ++i) {
      if (op->GetInputType(op, i) != types[i]) return false;
      if (op->GetInputCharacteristic(op, i) != (i == 4 ? kOptional : kRequired)) return false;
    }
  }
  return AttentionDescribesItself(domain);
}

// Runtimes that are too old or fail; the first that works keeps what it registers.
bool Register(SessionOptions* options) {
  for (int64_t number = 0; number < 7; ++number) {
    if (!DomainFails(number)) return false;
  }
  Status* status = RegisterCustomOps(options, Runtime("1.10.0", 1));
  if (!status || status->text.find("1.18") == std::string::npos || options->domain) return false;
  Release(status);
  if (RegisterCustomOps(options, Runtime("1.10.0", 0))) return false;  // nothing to say it with
  if (RegisterCustomOps(options, Runtime("1.32.0")) || !options->domain) return false;
  SessionOptions second;
  FailCall(0);
  status = RegisterCustomOps(&second, Runtime("1.32.0"));
  FailCall(-1);
  if (!status) return false;
  Release(status);
  if (RegisterCustomOps(&second, Runtime("1.32.0"))) return false;
  if (second.domain != options->domain) return false;
  return DescribesItself(*options->domain) && Alive() == 0;
}

}  // namespace
}  // namespace qalora_test

int main(int count, char** values) {
  using namespace qalora_test;
  const uint64_t seed = count > 1 ? std::strtoull(values[1], nullptr, 10) : 1;
  const int64_t cases = count > 2 ? std::strtoll(values[2], nullptr, 10) : 100000;
  qalora::ort::SessionOptions options;
  if (!Register(&options)) {
    std::printf("FAILED: the library does not register as it should\n");
    return 1;
  }
  Fuzzer fuzzer(seed, *options.domain);
  for (int64_t number = 0; number < cases; ++number) {
    if (!fuzzer.Run(number)) return 1;
  }
  const Counts& counts = fuzzer.counts();
  std::printf("fuzz: %lld cases of seed %llu; %lld steps succeeded, %lld were refused, %lld had "
              "faults injected, %lld shapes were inferred\n",
              static_cast<long long>(cases), static_cast<unsigned long long>(seed),
              static_cast<long long>(counts.legal), static_cast<long long>(counts.wrong),
              static_cast<long long>(counts.faults), static_cast<long long>(counts.inferred));
  return 0;
}
