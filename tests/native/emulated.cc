#include "emulated.h"

#include <cstring>

#include "dispatch.h"

#if defined(QALORA_X86) && defined(QALORA_EMULATED)
#include "emulated_tiles.h"
#endif

namespace qalora_test {

#if defined(QALORA_X86) && defined(QALORA_EMULATED)
namespace {

struct Emulated {
  const char* base;  // the level whose vectors it takes
  const qalora::KernelSet* (*get)();
};
constexpr Emulated kEmulated[] = {{"avx2", EmulatedAmx2}, {"avx512", EmulatedAmx512}};

// Tiles with one mistake each.
struct KeptTiles : qalora::EmulatedTiles {
  template <int tile>
  static void Zero() {}
};
struct LongTiles : qalora::EmulatedTiles {
  template <int tile>
  static void Store(void* to, int64_t stride) {
    EmulatedTiles::Store<tile>(to, stride);
    if (tile == 2) static_cast<uint8_t*>(to)[1023] ^= 1;
  }
};

}  // namespace

std::vector<std::string> EmulatedNames() {
  std::vector<std::string> names;
  for (const Emulated& level : kEmulated) {
    if (qalora::FindKernels(level.base)) names.push_back(level.get()->name);
  }
  return names;
}

const qalora::KernelSet* FindLevel(const char* name) {
  for (const Emulated& level : kEmulated) {
    if (qalora::FindKernels(level.base) && std::strcmp(level.get()->name, name) == 0) {
      return level.get();
    }
  }
  return qalora::FindKernels(name);
}

bool TilesAreChecked() {
  return qalora::TilesWork<qalora::EmulatedTiles>() && qalora::EmulatedTiles::Released() &&
         !qalora::TilesWork<KeptTiles>() && !qalora::TilesWork<LongTiles>();
}

#else

std::vector<std::string> EmulatedNames() { return {}; }
const qalora::KernelSet* FindLevel(const char* name) { return qalora::FindKernels(name); }
bool TilesAreChecked() { return true; }

#endif

}  // namespace qalora_test
