#include "dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(QALORA_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(QALORA_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
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
  char note[120] = {};

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
        if (AmxKernels() && HasAmx()) AddAmx();
      }
    }
#endif
#if defined(QALORA_ARM64)
    if (HasDotProduct()) {
      Add(&kNeonKernels);
      if (I8mmKernels() && HasMatrixProduct()) Add(I8mmKernels());
    }
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
  // AMX-TILE and AMX-INT8, bits 24 and 25 of EDX, on a system that saves the tiles and their
  // configuration, bits 17 and 18 of XCR0.
  static bool HasAmx() {
    constexpr unsigned tiles = 3u << 24, state = 3u << 17;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles) != tiles) return false;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & state) == state;
  }
  void AddAmx() {
    const char* problem = AmxProblem();
    if (!problem) return Add(AmxKernels());
    std::snprintf(note, sizeof note, "%s is not used: %s", AmxKernels()->name, problem);
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
  static bool HasMatrixProduct() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP2) & (1ul << 13)) != 0;  // HWCAP2_I8MM
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
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

const char* KernelNote() { return AllLevels().note; }

const KernelSet* ChooseKernels(Error* error) {
  const char* forced = std::getenv("QALORA_KERNEL");
  if (!forced || !*forced) return BestKernels();
  if (const KernelSet* set = FindKernels(forced)) return set;
  std::snprintf(error->text, sizeof error->text,
                "GroupQuantLinear: the environment variable QALORA_KERNEL is \"%.40s\", expected one "
                "of the levels that this CPU and this build have: %s%s%s",
                forced, KernelNames(), *KernelNote() ? "; " : "", KernelNote());
  return nullptr;
}

}  // namespace qalora
