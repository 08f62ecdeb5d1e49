#include "large_pages.h"

#include <cstdint>

#if defined(__linux__)
#include <cstdio>
#include <cstring>

#include <sys/mman.h>
#endif

namespace qalora {

#if defined(__linux__)
namespace {

constexpr uintptr_t kPage = uintptr_t{2} << 20;
// A smaller tensor is not worth a page, most of which might be unused memory around it.
constexpr size_t kLeastBytes = size_t{64} << 10;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack

// What the administrator has set: "always [madvise] never" with the choice in brackets.
bool Allowed() {
  std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "re");
  if (!file) return false;
  char text[64] = {};
  const bool read = std::fgets(text, sizeof text, file) != nullptr;
  std::fclose(file);
  return read && !std::strstr(text, "[never]");
}

}  // namespace

void UseLargePages(const void* data, size_t bytes) {
  static const bool allowed = Allowed();
  if (!allowed || bytes < kLeastBytes) return;
  // Pages that the tensor shares with others are moved too; the system leaves out what does not lie
  // within one mapping.
  const uintptr_t first = reinterpret_cast<uintptr_t>(data) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + kPage - 1) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(first), end - first, kCollapse);
}
#else
void UseLargePages(const void*, size_t) {}
#endif

}  // namespace qalora
