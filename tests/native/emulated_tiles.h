// The tile operations of AMX as Intel's manual states them, palette 1, in plain C++. What would be
// a fault ends the program.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "amx_panel.h"

namespace qalora {
namespace {

class EmulatedTiles {
 public:
  static void Configure(const TileConfig& config) {
    Need(config.palette == 1 && config.start_row == 0, "palette 1, from row 0");
    for (const uint8_t byte : config.reserved) Need(byte == 0, "reserved bytes are 0");
    State& state = Mine();
    for (int t = 0; t < 16; ++t) {
      const int rows = config.rows[t], bytes = config.row_bytes[t];
      Need((rows == 0) == (bytes == 0), "a tile has rows and bytes, or neither");
      Need(t < kTiles || rows == 0, "eight tiles");
      Need(rows <= kRows && bytes <= kBytes, "16 rows of 64 bytes");
      if (t < kTiles) state.tiles[t] = Tile{rows, bytes, {}};
    }
    state.configured = true;
  }
  static void Release() { Mine() = State{}; }

  template <int tile>
  static void Load(const void* from, int64_t stride) {
    Tile& to = At(tile);
    std::memset(to.data, 0, sizeof to.data);
    for (int r = 0; r < to.rows; ++r) {
      std::memcpy(to.data[r], static_cast<const uint8_t*>(from) + r * stride, to.bytes);
    }
  }
  template <int tile>
  static void Zero() {
    Tile& to = At(tile);
    std::memset(to.data, 0, sizeof to.data);
  }
  template <int tile>
  static void Store(void* to, int64_t stride) {
    const Tile& from = At(tile);
    for (int r = 0; r < from.rows; ++r) {
      std::memcpy(static_cast<uint8_t*>(to) + r * stride, from.data[r], from.bytes);
    }
  }

  // TDPBSUD: 32-bit words of the sums += four signed bytes of a row of the first factor times four
  // unsigned bytes of a column of the second one. Sums wrap.
  template <int sums, int first, int second>
  static void Dot() {
    static_assert(sums != first && sums != second && first != second, "three tiles");
    Tile& c = At(sums);
    const Tile &a = At(first), &b = At(second);
    Need(c.bytes % 4 == 0 && a.bytes % 4 == 0 && b.bytes % 4 == 0, "rows of 32-bit words");
    Need(c.rows == a.rows && a.bytes / 4 == b.rows && c.bytes == b.bytes, "sizes that fit");
    for (int m = 0; m < c.rows; ++m) {
      uint32_t line[kBytes / 4];
      std::memcpy(line, c.data[m], sizeof line);
      for (int k = 0; k < a.bytes / 4; ++k) {
        for (int n = 0; n < c.bytes / 4; ++n) {
          for (int i = 0; i < 4; ++i) {
            const int32_t x = static_cast<int8_t>(a.data[m][4 * k + i]);
            line[n] += static_cast<uint32_t>(x * b.data[k][4 * n + i]);
          }
        }
      }
      std::memset(c.data[m], 0, sizeof c.data[m]);
      std::memcpy(c.data[m], line, c.bytes);
    }
    for (int m = c.rows; m < kRows; ++m) std::memset(c.data[m], 0, sizeof c.data[m]);
  }

  // Whether this thread has released its tiles.
  static bool Released() { return !Mine().configured; }

 private:
  static constexpr int kTiles = 8, kRows = 16, kBytes = 64;
  struct Tile {
    int rows, bytes;
    uint8_t data[kRows][kBytes];
  };
  struct State {
    bool configured = false;
    Tile tiles[kTiles] = {};
  };

  static State& Mine() {
    static thread_local State state;
    return state;
  }
  static Tile& At(int number) {
    State& state = Mine();
    Need(state.configured, "tiles that are configured");
    Need(state.tiles[number].rows > 0, "a tile that is configured");
    return state.tiles[number];
  }
  static void Need(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "emulated tiles: the instruction needs %s\n", what);
    std::abort();
  }
};

}  // namespace
}  // namespace qalora
