#include "dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(QALORA_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(QALORA_X86)
#include <cpuid.h>
#endif

namespace qalora {
namespace {

constexpr int kMaxLevels = 5;

struct Levels {
  const KernelSet* sets[kMaxLevels] = {};
  int count = 0;
  char names[64] = {};

  void Add(const KernelSet* set) {
    if (count) std::strcat(names, ",");
    std::strcat(names, set->name);
    sets[count++] = set;
  }

  // Slowest first.
  Levels() {
    Add(&kScalarKernels);
#if defined(QALORA_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        HasHalfConversions()) {
      Add(&kAvx2Kernels);
      if (AvxVnniKernels() && HasAvxVnni()) Add(AvxVnniKernels());
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512vnni")) {
        Add(&kAvx512Kernels);
      }
    }
#endif
#if defined(QALORA_ARM64)
    if (HasDotProduct()) Add(&kNeonKernels);
#endif
  }

#if defined(QALORA_X86)
  // F16C, which __builtin_cpu_supports of older Clang does not know.
  static bool HasHalfConversions() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }
  // Bit 4 of EAX, which older compilers have no name for.
  static bool HasAvxVnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
  }
#endif

#if defined(QALORA_ARM64)
  static bool HasDotProduct() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & (1ul << 20)) != 0;  // HWCAP_ASIMDDP
#else
    return true;  // Apple: every 64-bit Arm machine that runs macOS has it
#endif
  }
#endif
};

const Levels& AllLevels() {
  static const Levels levels;
  return levels;
}

}  // namespace

const KernelSet* BestKernels() {
  const Levels& levels = AllLevels();
  return levels.sets[levels.count - 1];
}

const KernelSet* FindKernels(const char* name) {
  const Levels& levels = AllLevels();
  for (int i = 0; i < levels.count; ++i) {
    if (std::strcmp(levels.sets[i]->name, name) == 0) return levels.sets[i];
  }
  return nullptr;
}

const char* KernelNames() { return AllLevels().names; }

const KernelSet* ChooseKernels(Error* error) {
  const char* forced = std::getenv("QALORA_KERNEL");
  if (!forced || !*forced) return BestKernels();
  if (const KernelSet* set = FindKernels(forced)) return set;
  std::snprintf(error->text, sizeof error->text,
                "GroupQuantLinear: the environment variable QALORA_KERNEL is \"%.40s\", expected one "
                "of the levels that this CPU and this build have: %s",
                forced, KernelNames());
  return nullptr;
}

}  // namespace qalora
