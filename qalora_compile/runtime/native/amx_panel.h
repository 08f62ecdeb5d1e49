// Panels of bytes times x on the tiles of AMX-INT8, written once over the tile operations.
//
// V is the vector type, whose lanes are the columns of a tile, and Tiles has the operations:
// amx.cc has the instructions, tests/native/emulated_tiles.h what they do, in plain C++.
// Tiles provides: Configure(config), Release(), Load<tile>(from, stride), Zero<tile>(),
// Dot<sums, signed, unsigned>(), Store<tile>(to, stride).
//
// A panel's vectors are four codes of each column, which is how the instructions want their third
// operand, and x lies in tiles of 16 rows. A block of 32 or 16 codes has its own scale, so that the
// sums of each are stored and converted: the products of the next block are under way meanwhile.
#pragma once

#include "matrix_level.h"

namespace qalora {
namespace {

// The operand of LDTILECFG, palette 1.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "64 bytes, as the instruction reads them");

constexpr int kTileRows = 16;
// Numbers of the tiles: from kSums and kDigits on one for each digit.
constexpr int kSums = 0, kDigits = 3, kCodes = 6;

// A vector type of a level with tiles.
template <class V, class Tiles>
struct Tiled : V {
  static constexpr int kPanelDigits = 3;
};

template <class V, class Tiles>
struct PanelLayout<Tiled<V, Tiles>> {
  static constexpr int64_t kRows = kTileRows;
  static constexpr int64_t Unit(int64_t block) { return block; }
};

// Makes room for `rows` rows of x, of blocks of `block` digits, and `columns` columns.
template <class Tiles>
void ConfigureTiles(int64_t rows, int64_t block, int64_t columns, int digits) {
  TileConfig config;
  for (int d = 0; d < digits; ++d) {
    config.rows[kSums + d] = config.rows[kDigits + d] = static_cast<uint8_t>(rows);
    config.row_bytes[kSums + d] = static_cast<uint16_t>(4 * columns);
    config.row_bytes[kDigits + d] = static_cast<uint16_t>(block);
  }
  config.rows[kCodes] = static_cast<uint8_t>(block / 4);
  config.row_bytes[kCodes] = static_cast<uint16_t>(4 * columns);
  Tiles::Configure(config);
}

// Sums of products of one block: sums[d], [rows, columns], of digit d of x, [digits, rows, block],
// with codes, [block / 4, columns, 4].
template <class Tiles, int digits, int columns>
inline __attribute__((always_inline)) void MultiplyTiles(const int8_t* x, int64_t rows,
                                                         int64_t block, const uint8_t* codes,
                                                         int32_t (*sums)[kTileRows * columns]) {
  Tiles::template Load<kCodes>(codes, 4 * columns);
  Unroll<digits>([&](auto d) {
    Tiles::template Zero<kSums + d.k>();
    Tiles::template Load<kDigits + d.k>(x + d.k * rows * block, block);
    Tiles::template Dot<kSums + d.k, kDigits + d.k, kCodes>();
  });
  Unroll<digits>([&](auto d) { Tiles::template Store<kSums + d.k>(sums[d.k], 4 * columns); });
}

template <class V, class Tiles>
struct PanelProduct<Tiled<V, Tiles>> {
  static constexpr int kVectors = 1;
  static constexpr int kColumns = V::kLanes;

  template <int width, int digits, int block>
  static QALORA_ONCE void Run(const Job& job, const BytePanel& panel) {
    const int64_t full = job.rows - job.rows % kTileRows, rest = job.rows - full;
    if (full) {
      ConfigureTiles<Tiles>(kTileRows, block, kColumns, digits);
      for (int64_t m = 0; m < full; m += kTileRows) {
        Tile<digits, block, true>(job, panel, m, kTileRows);
      }
    }
    if (rest) {
      ConfigureTiles<Tiles>(rest, block, kColumns, digits);
      Tile<digits, block, false>(job, panel, full, rest);
    }
    Tiles::Release();
  }

  // y of one tile of rows += the panel's blocks times x.
  template <int digits, int block, bool full>
  static QALORA_ONCE void Tile(const Job& job, const BytePanel& panel, int64_t m, int64_t rows) {
    const int64_t scale_pitch = job.plan.block_floats;
    const int8_t* x = job.quantized + m * job.plan.pitch();
    const float* x_scale = job.block_scale + m * scale_pitch;
    alignas(64) int32_t sums[2][digits][kTileRows * kColumns];
    typename V::F acc[kTileRows];
    for (auto& value : acc) value = V::ZeroF();
    const auto each_row = [&](auto&& use) {
      Unroll<kTileRows>([&](auto r) { if (full || r.k < rows) use(r); });
    };
    const auto multiply = [&](int64_t b) {
      MultiplyTiles<Tiles, digits, kColumns>(x + b * digits * rows * block, rows, block,
                                             panel.codes + (b - panel.begin) * block * kColumns,
                                             sums[b % 2]);
    };
    multiply(panel.begin);
    for (int64_t b = panel.begin; b < panel.end; ++b) {
      if (b + 1 < panel.end) multiply(b + 1);
      const auto scale = V::LoadF(panel.scales[0] + GroupOfBlock(job, b) * kColumns);
      each_row([&](auto r) {
        auto total = V::LoadSum(sums[b % 2][0] + r.k * kColumns);
        Unroll<digits - 1>([&](auto d) {
          total = V::Join(total, V::LoadSum(sums[b % 2][d.k + 1] + r.k * kColumns));
        });
        const auto both = V::Mul(scale, V::SetF(x_scale[r.k * scale_pitch + b]));
        acc[r.k] = V::Fma(V::ToFloat(total), both, acc[r.k]);
      });
    }
    each_row([&](auto r) {
      float* to = panel.y + (m + r.k) * kTaskRows;
      V::StoreF(to, V::Add(V::LoadF(to), acc[r.k]));
    });
  }
};

// Whether the tiles compute what plain loops do, bit for bit: products of fixed digits and codes, in
// full and in partial tiles. Sums that no row has stay as they are.
template <class Tiles>
bool TilesMultiply(int64_t rows, int64_t block) {
  constexpr int kColumns = 16, kDigits = 3, kSize = kTileRows * kColumns;
  uint32_t state = 1;
  const auto next = [&] {
    state = state * 1664525 + 1013904223;
    return static_cast<uint8_t>(state >> 24);
  };
  alignas(64) int8_t x[kDigits * kTileRows * 32];
  alignas(64) uint8_t codes[32 * kColumns];
  alignas(64) int32_t sums[kDigits][kSize], expected[kDigits][kSize];
  for (auto& digit : x) digit = static_cast<int8_t>(next());
  for (auto& code : codes) code = next();
  std::memset(sums, 0x5a, sizeof sums);
  std::memcpy(expected, sums, sizeof sums);
  for (int64_t d = 0; d < kDigits; ++d) {
    for (int64_t i = 0; i < rows * kColumns; ++i) {
      int32_t sum = 0;
      for (int64_t k = 0; k < block; ++k) {
        sum += x[(d * rows + i / kColumns) * block + k] *
               codes[(k / 4 * kColumns + i % kColumns) * 4 + k % 4];
      }
      expected[d][i] = sum;
    }
  }
  ConfigureTiles<Tiles>(rows, block, kColumns, kDigits);
  for (int twice = 0; twice < 2; ++twice) {
    MultiplyTiles<Tiles, kDigits, kColumns>(x, rows, block, codes, sums);
  }
  Tiles::Release();
  return std::memcmp(sums, expected, sizeof sums) == 0;
}

template <class Tiles>
bool TilesWork() {
  constexpr int64_t blocks[] = {16, 32}, heights[] = {1, 5, kTileRows};
  for (const int64_t block : blocks) {
    for (const int64_t rows : heights) {
      if (!TilesMultiply<Tiles>(rows, block)) return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace qalora
