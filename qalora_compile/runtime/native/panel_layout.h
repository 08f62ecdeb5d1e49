// How the digits of x lie for panels of bytes.
#pragma once

#include "kernels.h"

namespace qalora {
namespace {

// A level that reads several rows of x with one instruction specializes this. Rows lie in tiles of
// kRows, of which the last one has the rows that are left: [tiles, blocks, digits, units of a block,
// rows of the tile, bytes of a unit]. So a tile takes as much room as its rows take one by one.
template <class V>
struct PanelLayout {
  static constexpr int64_t kRows = 1;
  static constexpr int64_t Unit(int64_t block) { return block; }
};

// The tile of a row.
struct RowTile {
  int64_t first = 0;
  int64_t rows = 0;
};

template <class V>
inline RowTile TileOfRow(const Job& job, int64_t row) {
  const int64_t first = row - row % PanelLayout<V>::kRows, left = job.rows - first;
  return {first, left < PanelLayout<V>::kRows ? left : PanelLayout<V>::kRows};
}

}  // namespace
}  // namespace qalora
