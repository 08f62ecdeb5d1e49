// Reading bits that do not start at a byte.
//
// Static for the reason given in half.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace qalora {

// Bits [first, first + count) of a little-end-first stream, count at most 64; reads only their bytes.
static inline uint64_t LoadBits(const uint8_t* stream, int64_t first, int64_t count) {
  uint64_t value = 0;
  for (int64_t done = 0; done < count;) {
    const int64_t at = first + done, inside = at % 8;
    const int64_t take = 8 - inside < count - done ? 8 - inside : count - done;
    const uint64_t bits = (stream[at / 8] >> inside) & ((1u << take) - 1);
    value |= bits << done;
    done += take;
  }
  return value;
}

static inline uint64_t LoadWord(const uint8_t* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// The high bits of field f of the low bytes from `first` on, at most `most` of them, in a unit that
// covers `size` bytes.
static inline uint64_t HighBits(const uint8_t* unit, int64_t size, int64_t first, int f,
                                int64_t most) {
  return LoadBits(unit, f * size + first, size - first < most ? size - first : most);
}

}  // namespace qalora
