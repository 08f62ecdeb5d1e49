// Arm NEON with panels multiplied by the matrix instructions of Armv8.6 (i8mm).

#include "kernels.h"

#if defined(QALORA_ARM64) && defined(__ARM_FEATURE_MATMUL_INT8)

#include "matrix_level.h"
#include "neon_vector.h"

namespace qalora {
namespace {

struct I8mm : Neon {};

// The instruction multiplies eight codes of two columns with eight digits of two rows. So eight
// digits of a row lie next to those of the next one.
constexpr int kRowsOfTile = 8;
constexpr int kDigitsOfUnit = 8;

template <>
struct PanelLayout<I8mm> {
  static constexpr int64_t kRows = kRowsOfTile;
  static constexpr int64_t Unit(int64_t) { return kDigitsOfUnit; }
};

template <>
struct PanelProduct<I8mm> {
  static constexpr int kVectors = 2;
  static constexpr int kPairs = 4;  // of columns in a panel

  template <int width, int digits, int block>
  static QALORA_ONCE void Run(const Job& job, const BytePanel& panel) {
    PairColumns(panel.codes, (panel.end - panel.begin) * block / kDigitsOfUnit);
    for (int64_t m = 0; m < job.rows; m += kRowsOfTile) {
      switch (TileOfRow<I8mm>(job, m).rows) {
        case 1: case 2: Tile<digits, block, 1>(job, panel, m); break;
        case 3: case 4: Tile<digits, block, 2>(job, panel, m); break;
        case 5: case 6: Tile<digits, block, 3>(job, panel, m); break;
        default: Tile<digits, block, 4>(job, panel, m);
      }
    }
  }

  // Four codes of each column, and the next four -> eight codes of each pair of columns.
  static void PairColumns(uint8_t* codes, int64_t units) {
    for (int64_t unit = 0; unit < units; ++unit, codes += 64) {
      uint32x4_t four[4];
      for (int i = 0; i < 4; ++i) four[i] = vreinterpretq_u32_u8(vld1q_u8(codes + 16 * i));
      for (int v = 0; v < 2; ++v) {
        const uint32x4x2_t eight = vzipq_u32(four[v], four[v + 2]);
        vst1q_u8(codes + 32 * v, vreinterpretq_u8_u32(eight.val[0]));
        vst1q_u8(codes + 32 * v + 16, vreinterpretq_u8_u32(eight.val[1]));
      }
    }
  }

  // Calls use(Index<pair of rows>, Index<pair of columns>).
  template <int pairs, class Use>
  static inline __attribute__((always_inline)) void Each(Use&& use) {
    Unroll<pairs>([&](auto p) { Unroll<kPairs>([&](auto c) { use(p, c); }); });
  }

  // Sums of products of one block. Their lanes: the first column of the pair with both rows, then
  // the second one. `second` is where the other row of the last pair lies; 0 where there is none.
  template <int digits, int block, int pairs>
  static inline __attribute__((always_inline)) void Multiply(const int8_t* x, int64_t rows,
                                                             int64_t second, const uint8_t* codes,
                                                             int32x4_t (&total)[pairs][kPairs]) {
    Unroll<digits>([&](auto d) {
      Each<pairs>([&](auto p, auto c) {
        total[p.k][c.k] = d.k ? vshlq_n_s32(total[p.k][c.k], 7) : vdupq_n_s32(0);
      });
      Unroll<block / kDigitsOfUnit>([&](auto j) {
        uint8x16_t code[kPairs];
        Unroll<kPairs>([&](auto c) { code[c.k] = vld1q_u8(codes + j.k * 64 + c.k * 16); });
        Unroll<pairs>([&](auto p) {
          const int8_t* from = x + 2 * p.k * kDigitsOfUnit;
          const int8x16_t digit = p.k + 1 < pairs
                                      ? vld1q_s8(from)
                                      : vcombine_s8(vld1_s8(from), vld1_s8(from + second));
          Unroll<kPairs>([&](auto c) {
            total[p.k][c.k] = vusmmlaq_s32(total[p.k][c.k], code[c.k], digit);
          });
        });
        x += rows * kDigitsOfUnit;
      });
    });
  }

  // y of the rows of the tile at m, in `pairs` pairs, += the panel's blocks times x.
  template <int digits, int block, int pairs>
  static QALORA_ONCE void Tile(const Job& job, const BytePanel& panel, int64_t m) {
    const int64_t rows = TileOfRow<I8mm>(job, m).rows, last = rows - 1;
    const int64_t scale_pitch = job.plan.block_floats;
    const int8_t* x = job.quantized + m * job.plan.pitch();
    const float* x_scale = job.block_scale + m * scale_pitch;
    float32x4_t acc[pairs][kPairs];
    Each<pairs>([&](auto p, auto c) { acc[p.k][c.k] = I8mm::ZeroF(); });
    for (int64_t b = panel.begin; b < panel.end; ++b) {
      int32x4_t total[pairs][kPairs];
      Multiply<digits, block, pairs>(x + b * digits * block * rows, rows,
                                     last % 2 ? kDigitsOfUnit : 0,
                                     panel.codes + (b - panel.begin) * block * 8, total);
      const int64_t group = GroupOfBlock(job, b) * I8mm::kLanes;
      float32x4_t scale[kPairs];
      Unroll<2>([&](auto v) {
        const float32x4_t four = vld1q_f32(panel.scales[v.k] + group);
        scale[2 * v.k] = vzip1q_f32(four, four);
        scale[2 * v.k + 1] = vzip2q_f32(four, four);
      });
      Unroll<pairs>([&](auto p) {
        const int64_t next = 2 * p.k < last ? 2 * p.k + 1 : 2 * p.k;
        const float two[2] = {x_scale[2 * p.k * scale_pitch + b], x_scale[next * scale_pitch + b]};
        const float32x4_t both = vcombine_f32(vld1_f32(two), vld1_f32(two));
        Unroll<kPairs>([&](auto c) {
          acc[p.k][c.k] = vfmaq_f32(acc[p.k][c.k], vcvtq_f32_s32(total[p.k][c.k]),
                                    vmulq_f32(scale[c.k], both));
        });
      });
    }
    Unroll<pairs>([&](auto p) {
      float* y = panel.y + (m + 2 * p.k) * kTaskRows;
      AddRow(y, vuzp1q_f32(acc[p.k][0], acc[p.k][1]), vuzp1q_f32(acc[p.k][2], acc[p.k][3]));
      if (2 * p.k < last) {
        AddRow(y + kTaskRows, vuzp2q_f32(acc[p.k][0], acc[p.k][1]),
               vuzp2q_f32(acc[p.k][2], acc[p.k][3]));
      }
    });
  }

  static inline __attribute__((always_inline)) void AddRow(float* y, float32x4_t low,
                                                           float32x4_t high) {
    vst1q_f32(y, vaddq_f32(vld1q_f32(y), low));
    vst1q_f32(y + 4, vaddq_f32(vld1q_f32(y + 4), high));
  }
};

}  // namespace

const KernelSet* I8mmKernels() {
  static const KernelSet kernels = MakeMatrixKernels<I8mm, kNeonKernels>("i8mm");
  return &kernels;
}

}  // namespace qalora

#elif defined(QALORA_ARM64)

namespace qalora {

// The compiler is older than the instructions.
const KernelSet* I8mmKernels() { return nullptr; }

}  // namespace qalora

#endif
