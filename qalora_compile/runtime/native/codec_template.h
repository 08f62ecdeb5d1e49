// Codes of a step, rows of codes and parameters of groups, written once over a vector type V.
//
// Everything is in an unnamed namespace on purpose: the including files are compiled for different
// instruction sets, so nothing here may be merged across them. For the same reason no function of
// the standard library is called, only intrinsics and memory functions.
#pragma once

#include <cstdint>
#include <cstring>

#include "bits.h"
#include "kernels.h"

namespace qalora {
namespace {

// A function that is the same for several callers is compiled once, not inlined into each.
#define QALORA_ONCE __attribute__((noinline))
// GCC leaves lambdas of a long function uninlined otherwise, and vectors then go through memory.
#define QALORA_INLINE __attribute__((always_inline))

// Sums of four rows.
using Four = float __attribute__((vector_size(16)));

template <int value>
struct Index {
  static constexpr int k = value;
};

// Calls f(Index<0>), ..., f(Index<count - 1>): shifts and fields need constants.
template <int count, int from = 0, class Function>
inline __attribute__((always_inline)) void Unroll(Function&& f) {
  if constexpr (from < count) {
    f(Index<from>{});
    Unroll<count, from + 1>(f);
  }
}

// How far ahead memory is asked for, in bytes. DRAM pages and the hardware prefetcher both end at 4
// KiB, so codes are asked for from the page after; scales and zero-points are read at a fraction of
// the speed. Measured with the weights out of cache (benchmarks/ort_layers.py).
constexpr int64_t kCodesAhead = 6144;
constexpr int64_t kParametersAhead = 2048;

// How a step's bytes become codes. A step is a vector of kField-bit fields; byte i, field f holds
// code i * kPerByte + f of the step. 3-bit codes are 2-bit fields with a plane of high bits: see
// kUnitBytes.
template <class V, int bits>
struct Codec {
  using I = typename V::I;
  static constexpr int kField = bits == 3 ? 2 : bits;
  static constexpr int kPerByte = 8 / kField;
  static constexpr int kLaneFields = 32 / kField;
  static constexpr int kCodes = V::kStep * kPerByte;

  // What a step has loaded.
  struct Bytes {
    I low;
    typename V::High high;  // of 3 bits
  };

  // Field f of each byte, as a byte.
  template <int f>
  static inline __attribute__((always_inline)) I ByteCodes(const Bytes& v) {
    const I codes = V::And(V::template Shr<f * kField>(v.low), V::SetBytes((1 << kField) - 1));
    if constexpr (bits == 3) {
      return V::template AddHigh<f>(codes, v.high);
    } else {
      return codes;
    }
  }

  // The codes of a step, a vector of bytes for each plane.
  struct Planes {
    I plane[kPerByte];
  };
  static inline __attribute__((always_inline)) Planes Unpack(const Bytes& v) {
    Planes codes;
    Unroll<kPerByte>([&](auto f) { codes.plane[f.k] = ByteCodes<f.k>(v); });
    return codes;
  }

  // Sums of code times activation in each lane, exact, of `wide` weight rows and `tall` rows of x
  // that are `pitch` bytes apart: the digits of x one after the other, each in the order of the
  // planes. The largest sum, of four codes of 8 bits, is 4 * 255 * 127 * 128^2 < 2^31.
  template <int digits, int wide, int tall>
  static inline __attribute__((always_inline)) void Dot(const Planes (&codes)[wide],
                                                        const int8_t* x, int64_t pitch,
                                                        typename V::Sum (&total)[wide][tall]) {
    const auto each = [&](auto&& use) {
      Unroll<tall>([&](auto r) { Unroll<wide>([&](auto w) { use(w, r); }); });
    };
    Unroll<digits>([&](auto d) {
      constexpr bool more = d.k > 0;
      typename V::Acc acc[wide][tall];
      each([&](auto w, auto r) { acc[w.k][r.k] = more ? V::template Seed<bits>(total[w.k][r.k]) : V::ZeroAcc(); });
      Unroll<kPerByte>([&](auto f) {
        Unroll<tall>([&](auto r) {
          const I value = V::LoadX(x + r.k * pitch + d.k * kCodes + f.k * V::kStep);
          Unroll<wide>([&](auto w) {
            acc[w.k][r.k] = V::template Dot<bits>(acc[w.k][r.k], codes[w.k].plane[f.k], value);
          });
        });
      });
      each([&](auto w, auto r) {
        total[w.k][r.k] = V::template Settle<bits, more>(total[w.k][r.k], acc[w.k][r.k]);
      });
    });
  }

  // Calls use(Index<slot>, codes as floats) for the fields of a lane, slot by slot.
  template <class Use>
  static inline __attribute__((always_inline)) void EachField(const Bytes& v, Use&& use) {
    if constexpr (bits == 3) {
      Unroll<kPerByte>([&](auto f) {
        const I codes = ByteCodes<f.k>(v);
        Unroll<4>([&](auto byte) {
          use(Index<byte.k * kPerByte + f.k>{}, V::template SmallByte<byte.k>(codes));
        });
      });
    } else {
      Unroll<kLaneFields>([&](auto field) {
        use(field, V::template Field<kField, field.k>(v.low));
      });
    }
  }
};

// A row of codes, walked step by step.
template <class V, int bits>
struct RowReader {
  using Bytes = typename Codec<V, bits>::Bytes;
  const uint8_t* low;
  const uint8_t* high;
  int64_t bytes;  // of the low part

  RowReader() = default;
  RowReader(const uint8_t* row, int64_t low_bytes)
      : low(row), high(row + low_bytes), bytes(low_bytes) {}
  RowReader(const Job& job, int64_t n)
      : RowReader(job.codes + n * job.layer->row_bytes(), job.layer->low_bytes()) {}
  // Reads no byte past the row, except where `inside` says that there are kPastRow more.
  inline __attribute__((always_inline)) Bytes Step(int64_t step, bool inside = false) const {
    const int64_t at = step * V::kStep;
    Bytes v;
    const bool full = __builtin_expect(inside || at + V::kStep <= bytes, 1);
    v.low = full ? V::Load(low + at) : V::LoadPartial(low + at, bytes - at);
    if constexpr (bits == 3) {
      const int64_t first = at % kUnitBytes, unit = at - first;
      const int64_t left = bytes - unit;
      const int64_t size = left < kUnitBytes ? left : kUnitBytes;
      v.high = V::High::Load(high + unit / 2, size, first, inside);
    }
    return v;
  }
  inline __attribute__((always_inline)) void Prefetch(int64_t step,
                                                      int64_t ahead = kCodesAhead) const {
    V::Prefetch(low + step * V::kStep + ahead);
    if constexpr (bits == 3) V::Prefetch(high + step * V::kStep / 2 + ahead);
  }
};

}  // namespace
}  // namespace qalora
