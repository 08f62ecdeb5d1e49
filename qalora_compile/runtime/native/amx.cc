// AVX-512 with panels on the tiles of AMX-INT8, which Linux gives to processes that ask for them.

#include "kernels.h"

#if defined(QALORA_X86) && defined(__AMX_INT8__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

#include "avx512_vector.h"
#include "amx_panel.h"

namespace qalora {
namespace {

constexpr long kAskPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of arch_prctl
constexpr long kTileData = 18;           // the tiles' bit of XCR0

// The instructions. GCC's intrinsics take no number of a tile from a template, and do not say that
// they read memory, so that a store before them may come too late: hence assembler.
struct AmxTiles {
  static void Configure(const TileConfig& config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  static void Release() { __asm__ volatile("tilerelease" : : : "memory"); }
  template <int tile>
  static void Load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(stride), "i"(tile)
                     : "memory");
  }
  template <int tile>
  static void Zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  // The bytes of the first factor are signed, those of the second are not.
  template <int sums, int first, int second>
  static void Dot() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(first), "i"(second));
  }
  template <int tile>
  static void Store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(to), "r"(stride), "i"(tile)
                     : "memory");
  }
};

}  // namespace

const KernelSet* AmxKernels() {
  static const KernelSet kernels =
      MakeMatrixKernels<Tiled<Avx512, AmxTiles>, kAvx512Kernels>("amx");
  return &kernels;
}

const char* AmxProblem() {
  if (syscall(SYS_arch_prctl, kAskPermission, kTileData) != 0) {
    return "Linux does not let this process use the tiles";
  }
  return TilesWork<AmxTiles>() ? nullptr : "the tiles of this CPU compute wrong products";
}

}  // namespace qalora

#elif defined(QALORA_X86)

namespace qalora {

// The compiler is older than the instructions, or the system is not Linux.
const KernelSet* AmxKernels() { return nullptr; }
const char* AmxProblem() { return nullptr; }

}  // namespace qalora

#endif
