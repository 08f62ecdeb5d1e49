// The high bits of 3-bit codes, which need not start at a byte.
//
// Static, or in an unnamed namespace, for the reason given in half.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

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

// The high bits of field f of the low bytes from `first` on, at most `most` of them, in a unit that
// covers `size` bytes.
static inline uint64_t HighBits(const uint8_t* unit, int64_t size, int64_t first, int f,
                                int64_t most) {
  return LoadBits(unit, f * size + first, size - first < most ? size - first : most);
}

namespace {

// The high bits of a step of 3-bit codes, field by field, where a step has as many bytes as Word has
// bits.
template <class Word>
struct HighWords {
  Word bits[4];

  static __attribute__((noinline)) HighWords LoadTail(const uint8_t* unit, int64_t size,
                                                      int64_t first) {
    const auto part = [=](int f) {
      return static_cast<Word>(HighBits(unit, size, first, f, 8 * sizeof(Word)));
    };
    return {{part(0), part(1), part(2), part(3)}};
  }
  // As LoadTail, where a word may be read past the unit; bits that are none of the unit's are
  // arbitrary. A field starts at a byte or in its middle.
  static inline __attribute__((always_inline)) HighWords LoadInside(const uint8_t* unit, int64_t size,
                                                                    int64_t first) {
    const auto part = [=](int f) {
      const int64_t at = f * size + first;
      uint64_t word;
      std::memcpy(&word, unit + at / 8, sizeof word);
      return static_cast<Word>(word >> at % 8);
    };
    return {{part(0), part(1), part(2), part(3)}};
  }
  // Of the low bytes from `first` on, in a unit that covers `size` bytes.
  static inline __attribute__((always_inline)) HighWords Load(const uint8_t* unit, int64_t size,
                                                              int64_t first, bool inside) {
    if (__builtin_expect(size != kUnitBytes, 0)) {
      return inside ? LoadInside(unit, size, first) : LoadTail(unit, size, first);
    }
    const auto part = [=](int f) {
      Word word;
      std::memcpy(&word, unit + f * (kUnitBytes / 8) + first / 8, sizeof word);
      return word;
    };
    return {{part(0), part(1), part(2), part(3)}};
  }
};

}  // namespace
}  // namespace qalora
