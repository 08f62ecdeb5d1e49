// Weights in pages of 2 MiB, where the system has them.
#pragma once

#include <cstddef>

namespace qalora {

// Has Linux move the memory of a tensor into large pages, with what shares these pages. A core that
// streams weights from memory otherwise waits for translations of addresses: docs/design/kernels.md has
// what was measured. Contents and addresses stay. Does nothing where the system forbids large pages,
// is older than Linux 6.1, or maps the tensor from a file.
void UseLargePages(const void* data, size_t bytes);

}  // namespace qalora
