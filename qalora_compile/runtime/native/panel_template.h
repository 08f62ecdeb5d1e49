// Many rows of x against panels of weights; written once over a vector type V as codec_template.h is.
//
// A panel holds codes of as many weight rows as a vector has lanes, transposed: each vector is four
// consecutive codes (or one dequantized weight) of each of these rows. So an activation is broadcast
// over all of them, sums stay in registers, and nothing is added across lanes.
#pragma once

#include "codec_template.h"
#include "panel_layout.h"

namespace qalora {
namespace {

// The columns of y that a panel is for, and what it is made of.
struct Columns {
  int64_t n = 0;      // the first one
  int64_t count = 0;  // that are there, at most V::kLanes; lanes after them repeat the last one
  float* scale = nullptr;    // [groups, lanes]
  float* product = nullptr;  // [groups, lanes]: scale * zero_point
  int64_t ahead = 0;  // bytes from a code to the one at its place in the panel after this
  int64_t Row(int64_t lane) const { return n + (lane < count ? lane : count - 1); }
};

// Fills the scales and products of the columns.
template <class V>
QALORA_ONCE void TransposeGroups(const Job& job, const Columns& columns) {
  const int64_t groups = job.layer->groups;
  const bool half = job.half_parameters;
  for (int64_t g = 0; g < groups; g += V::kLanes) {
    typename V::I scale[V::kLanes], product[V::kLanes];
    for (int64_t lane = 0; lane < V::kLanes; ++lane) {
      const int64_t n = columns.Row(lane);
      const auto s = V::LoadParameter(job.scale, half, n * groups + g, groups - g);
      const auto z = V::LoadParameter(job.zero_point, half, n * groups + g, groups - g);
      scale[lane] = V::Bits(s);
      product[lane] = V::Bits(V::Mul(s, z));
    }
    V::Transpose(scale);
    V::Transpose(product);
    for (int64_t i = 0; i < V::kLanes; ++i) {
      const int64_t at = (g + i) * V::kLanes;
      V::StoreF(columns.scale + at, V::Floats(scale[i]));
      V::StoreF(columns.product + at, V::Floats(product[i]));
    }
  }
}

inline int64_t GroupOfBlock(const Job& job, int64_t block) {
  return job.blocks.first[block / job.plan.lanes] + job.blocks.lane[block];
}

// One step of the codes of the columns, transposed: lane w of the step of each column is in vector w.
// 3-bit codes are put together before, plane by plane; other widths are shifted out after.
template <class V, int bits>
struct StepPanel {
  using C = Codec<V, bits>;
  using I = typename V::I;
  static constexpr int kParts = bits == 3 ? C::kPerByte : 1;
  I part[kParts][V::kLanes];

  // Asks for the same step of the columns after these.
  StepPanel(const Job& job, const Columns& columns, int64_t step) {
    Unroll<V::kLanes>([&](auto lane) {
      const RowReader<V, bits> reader(job, columns.Row(lane.k));
      const auto bytes = reader.Step(step);
      reader.Prefetch(step, columns.ahead);
      if constexpr (bits == 3) {
        Unroll<kParts>([&](auto f) { part[f.k][lane.k] = C::template ByteCodes<f.k>(bytes); });
      } else {
        part[0][lane.k] = bytes.low;
      }
    });
    for (auto& rows : part) V::Transpose(rows);
  }

  // Plane f of lane w: the codes (4 w + b) kPerByte + f for byte b.
  template <int f>
  inline __attribute__((always_inline)) I Plane(int w) const {
    if constexpr (bits == 3) {
      return part[f][w];
    } else {
      return V::And(V::template Shr<f * C::kField>(part[0][w]), V::SetBytes((1 << C::kField) - 1));
    }
  }

  // Calls use(Index<code of the lane>, codes as floats) for the codes of lane w.
  template <class Use>
  inline __attribute__((always_inline)) void EachCode(int w, Use&& use) const {
    if constexpr (bits == 3) {
      Unroll<C::kPerByte>([&](auto f) {
        Unroll<4>([&](auto byte) {
          use(Index<byte.k * C::kPerByte + f.k>{}, V::template SmallByte<byte.k>(part[f.k][w]));
        });
      });
    } else {
      Unroll<C::kLaneFields>([&](auto field) {
        use(field, V::template Field<C::kField, field.k>(part[0][w]));
      });
    }
  }
};

// Steps [begin, end) of the columns as bytes: for each lane of a step and each plane one vector,
// `pitch` bytes apart. The prepared activations lie in the same order.
template <class V, int bits>
QALORA_ONCE void PackBytes(const Job& job, const Columns& columns, int64_t begin, int64_t end, int64_t pitch,
               uint8_t* out) {
  using C = Codec<V, bits>;
  for (int64_t step = begin; step < end; ++step) {
    const StepPanel<V, bits> panel(job, columns, step);
    for (int w = 0; w < V::kLanes; ++w) {
      Unroll<C::kPerByte>([&](auto f) {
        V::Store(out, panel.template Plane<f.k>(w));
        out += pitch;
      });
    }
  }
}

// Steps [begin, end) of the columns as weights: one vector for each code, `pitch` floats apart.
template <class V, int bits>
QALORA_ONCE void PackFloats(const Job& job, const Columns& columns, int64_t begin, int64_t end, int64_t pitch,
                float* out) {
  using C = Codec<V, bits>;
  const int64_t lanes_per_block = job.layer->block() / C::kLaneFields;
  for (int64_t step = begin; step < end; ++step) {
    const StepPanel<V, bits> panel(job, columns, step);
    for (int w = 0; w < V::kLanes; ++w) {
      const int64_t block = (step * V::kLanes + w) / lanes_per_block;
      const int64_t used = block < job.plan.blocks ? block : job.plan.blocks - 1;
      const int64_t group = GroupOfBlock(job, used) * V::kLanes;
      const auto scale = V::LoadF(columns.scale + group);
      const auto offset = V::Negate(V::LoadF(columns.product + group));
      panel.EachCode(w, [&](auto slot, typename V::F code) {
        V::StoreF(out + slot.k * pitch, V::Fma(code, scale, offset));
      });
      out += C::kLaneFields * pitch;
    }
  }
}

// Tiles of kTall rows of x as long as there are enough, then smaller ones: tile(Index<rows>, m).
template <int tall, class Tile>
inline void EachTile(int64_t m, int64_t rows, Tile&& tile) {
  constexpr int next = tall > 8 ? 8 : tall > 4 ? 4 : tall > 2 ? 2 : 1;
  // Two of the next size rather than a full one and the rest.
  const auto fits = [&](int64_t left) {
    return left >= tall && (tall < 6 || left < 2 * next || left >= tall + next);
  };
  for (; fits(rows - m); m += tall) tile(Index<tall>{}, m);
  if constexpr (tall > 1) {
    EachTile<next>(m, rows, tile);
  }
}

// y of `tall` rows: minus the zero-points' term. `y` has kTaskRows floats a row.
template <class V, int tall>
QALORA_ONCE void ZeroTile(const Job& job, const Columns& columns, int64_t m, float* y) {
  const int64_t pitch = job.plan.group_floats;
  const float* sum = job.group_sum + m * pitch;
  typename V::F acc[tall];
  for (auto& value : acc) value = V::ZeroF();
  for (int64_t g = 0; g < job.layer->groups; ++g) {
    const auto product = V::Negate(V::LoadF(columns.product + g * V::kLanes));
    Unroll<tall>([&](auto r) {
      acc[r.k] = V::Fma(product, V::SetF(sum[r.k * pitch + g]), acc[r.k]);
    });
  }
  for (int r = 0; r < tall; ++r) V::StoreF(y + r * kTaskRows, acc[r]);
}

// y of `tall` rows, two vectors wide, += blocks [begin, end) of x times a panel of bytes that starts
// with block `begin`.
template <class V, int width, int digits, int block, int tall>
QALORA_ONCE void DigitTile(const Job& job, const float* const (&scales)[2], const uint8_t* panel,
                           int64_t begin, int64_t end, int64_t m, float* y) {
  constexpr int kDots = block / 4;
  const int64_t pitch = job.plan.pitch(), scale_pitch = job.plan.block_floats;
  const int8_t* x = job.quantized + m * pitch + begin * digits * block;
  const float* x_scale = job.block_scale + m * scale_pitch;
  typename V::F acc[tall][2];
  for (auto& line : acc) line[0] = line[1] = V::ZeroF();
  const auto each = [](auto&& use) {
    Unroll<tall>([&](auto r) { Unroll<2>([&](auto v) { use(r, v); }); });
  };
  for (int64_t b = begin; b < end; ++b) {
    typename V::Sum total[tall][2];
    Unroll<digits>([&](auto d) {
      constexpr bool more = d.k > 0;
      typename V::Acc part[tall][2];
      each([&](auto r, auto v) {
        part[r.k][v.k] = more ? V::template Seed<width>(total[r.k][v.k]) : V::ZeroAcc();
      });
      Unroll<kDots>([&](auto j) {
        const auto first = V::Load(panel + 2 * j.k * V::kStep);
        const auto second = V::Load(panel + (2 * j.k + 1) * V::kStep);
        Unroll<tall>([&](auto r) {
          const auto value = V::BroadcastX(x + r.k * pitch + d.k * block + j.k * 4);
          part[r.k][0] = V::template Dot<width>(part[r.k][0], first, value);
          part[r.k][1] = V::template Dot<width>(part[r.k][1], second, value);
        });
      });
      each([&](auto r, auto v) {
        total[r.k][v.k] = V::template Settle<width, more>(total[r.k][v.k], part[r.k][v.k]);
      });
    });
    const int64_t group = GroupOfBlock(job, b) * V::kLanes;
    const typename V::F scale[2] = {V::LoadF(scales[0] + group), V::LoadF(scales[1] + group)};
    Unroll<tall>([&](auto r) {
      const auto xs = V::SetF(x_scale[r.k * scale_pitch + b]);
      Unroll<2>([&](auto v) {
        const auto both = V::Mul(scale[v.k], xs);
        acc[r.k][v.k] = V::Fma(V::ToFloat(total[r.k][v.k]), both, acc[r.k][v.k]);
      });
    });
    panel += 2 * kDots * V::kStep;
    x += digits * block;
  }
  each([&](auto r, auto v) {
    float* to = y + r.k * kTaskRows + v.k * V::kLanes;
    V::StoreF(to, V::Add(V::LoadF(to), acc[r.k][v.k]));
  });
}

// A packed panel of bytes, which starts with block `begin`, and what it is multiplied into.
struct BytePanel {
  const float* scales[2] = {};  // of each vector of columns
  uint8_t* codes = nullptr;
  int64_t begin = 0, end = 0;  // blocks
  float* y = nullptr;          // of row 0
};

// How a panel of bytes is multiplied with all rows of x. A level with instructions on matrices
// specializes this.
template <class V>
struct PanelProduct {
  static constexpr int kVectors = 2;  // of columns in a panel
  template <int width, int digits, int block>
  static void Run(const Job& job, const BytePanel& panel) {
    EachTile<V::kTall / 2>(0, job.rows, [&](auto tall, int64_t m) {
      DigitTile<V, width, digits, block, tall.k>(job, panel.scales, panel.codes, panel.begin,
                                                 panel.end, m, panel.y + m * kTaskRows);
    });
  }
};

// y of `tall` rows, two vectors wide, += `length` values of x from column k times a panel of floats.
template <class V, int tall>
QALORA_ONCE void FloatTile(const Job& job, const float* panel, int64_t k, int64_t length, int64_t m,
                      float* y) {
  const int64_t pitch = job.layer->k;
  const float* x = job.x + m * pitch + k;
  typename V::F acc[tall][2];
  for (int r = 0; r < tall; ++r) {
    for (int v = 0; v < 2; ++v) acc[r][v] = V::ZeroF();
  }
  for (int64_t i = 0; i < length; ++i) {
    const auto first = V::LoadF(panel), second = V::LoadF(panel + V::kLanes);
    Unroll<tall>([&](auto r) {
      const auto value = V::SetF(x[r.k * pitch + i]);
      acc[r.k][0] = V::Fma(first, value, acc[r.k][0]);
      acc[r.k][1] = V::Fma(second, value, acc[r.k][1]);
    });
    panel += 2 * V::kLanes;
  }
  for (int r = 0; r < tall; ++r) {
    for (int v = 0; v < 2; ++v) {
      float* to = y + r * kTaskRows + v * V::kLanes;
      V::StoreF(to, V::Add(V::LoadF(to), acc[r][v]));
    }
  }
}

// Weight rows [begin, end) of a task: where its arrays lie, and its columns.
template <class V>
struct PanelTask {
  const Job& job;
  const int64_t begin, end;
  float* const y;       // [rows, kTaskRows]
  float* const panel;   // of bytes or of floats
  float* const groups;  // scales and products of all columns

  PanelTask(const Job& job, int64_t begin, int64_t end, float* scratch)
      : job(job),
        begin(begin),
        end(end),
        y(scratch),
        panel(y + job.rows * kTaskRows),
        groups(panel + 2 * V::kLanes * kFloatPanelCodes) {
    for (int64_t n = begin; n < end; n += V::kLanes) TransposeGroups<V>(job, At(n));
  }

  // One vector of columns. Past the end, the last one.
  Columns At(int64_t n) const {
    Columns columns;
    columns.n = n < end ? n : end - 1;
    columns.count = n >= end ? 1 : end - n < V::kLanes ? end - n : V::kLanes;
    columns.scale = groups + 2 * (n < end ? n - begin : 0) * job.plan.group_floats;
    columns.product = columns.scale + V::kLanes * job.plan.group_floats;
    return columns;
  }

  // The columns of vector `vector` of a panel that starts at n and is `wide` columns in all, of
  // `steps` steps. The panel after the task's last one is the first one of the next steps.
  Columns Of(int64_t n, int vector, int64_t wide, int64_t steps) const {
    Columns columns = At(n + vector * V::kLanes);
    const int64_t row = job.layer->row_bytes();
    columns.ahead = n + wide < end ? wide * row : (begin - n) * row + steps * V::kStep;
    return columns;
  }

  float* Y(int64_t m, int64_t n) const { return y + m * kTaskRows + n - begin; }

  // What the tiles have summed, and the bias.
  void Store() const {
    for (int64_t m = 0; m < job.rows; ++m) {
      float* to = job.y + m * job.layer->n;
      for (int64_t n = begin; n < end; ++n) to[n] = *Y(m, n) + (job.bias ? job.bias[n] : 0.0f);
    }
  }
};

// Calls chunk(first step, end) for parts of a weight row of `codes` codes each.
template <class V, int bits, class Chunk>
inline void EachChunk(const Job& job, int64_t codes, Chunk&& chunk) {
  const int64_t unit = codes / Codec<V, bits>::kCodes;
  for (int64_t step = 0; step < job.plan.steps; step += unit) {
    chunk(step, step + unit < job.plan.steps ? step + unit : job.plan.steps);
  }
}

template <class V, int bits, int digits, int block>
void BytePanels(const Job& job, int64_t begin, int64_t end, float* scratch) {
  using C = Codec<V, bits>;
  static_assert(kBytePanelCodes % C::kCodes == 0 && kBytePanelCodes <= 4 * kFloatPanelCodes,
                "panels are a multiple of steps and fit into their room");
  using Product = PanelProduct<V>;
  constexpr int kVectors = Product::kVectors;
  constexpr int64_t kWide = kVectors * V::kLanes;
  constexpr int kWidth = bits == 8 ? 8 : 4;  // narrower codes are multiplied alike
  const PanelTask<V> task(job, begin, end, scratch);
  BytePanel panel;
  panel.codes = reinterpret_cast<uint8_t*>(task.panel);
  for (int64_t n = begin; n < end; n += V::kLanes) {
    EachTile<V::kTall>(0, job.rows, [&](auto tall, int64_t m) {
      ZeroTile<V, tall.k>(job, task.At(n), m, task.Y(m, n));
    });
  }
  EachChunk<V, bits>(job, kBytePanelCodes, [&](int64_t step, int64_t stop) {
    const int64_t all = stop * C::kCodes / block;
    panel.begin = step * C::kCodes / block;
    panel.end = all < job.plan.blocks ? all : job.plan.blocks;
    for (int64_t n = begin; n < end; n += kWide) {
      for (int v = 0; v < kVectors; ++v) {
        const Columns columns = task.Of(n, v, kWide, stop - step);
        PackBytes<V, bits>(job, columns, step, stop, kVectors * V::kStep,
                           panel.codes + v * V::kStep);
        panel.scales[v] = columns.scale;
      }
      panel.y = task.Y(0, n);
      Product::template Run<kWidth, digits, block>(job, panel);
    }
  });
  task.Store();
}

template <class V, int bits>
void FloatPanels(const Job& job, int64_t begin, int64_t end, float* scratch) {
  using C = Codec<V, bits>;
  static_assert(kFloatPanelCodes % C::kCodes == 0, "panels are a multiple of steps");
  constexpr int64_t kWide = 2 * V::kLanes;
  const PanelTask<V> task(job, begin, end, scratch);
  std::memset(task.y, 0, job.rows * kTaskRows * sizeof(float));
  EachChunk<V, bits>(job, kFloatPanelCodes, [&](int64_t step, int64_t stop) {
    const int64_t k = step * C::kCodes, all = stop * C::kCodes;
    const int64_t length = (all < job.layer->k ? all : job.layer->k) - k;
    for (int64_t n = begin; n < end; n += kWide) {
      for (int v = 0; v < 2; ++v) {
        PackFloats<V, bits>(job, task.Of(n, v, kWide, stop - step), step, stop, kWide,
                            task.panel + v * V::kLanes);
      }
      EachTile<V::kTall>(0, job.rows, [&](auto tall, int64_t m) {
        FloatTile<V, tall.k>(job, task.panel, k, length, m, task.Y(m, n));
      });
    }
  });
  task.Store();
}

template <class V, int bits, int digits>
void RunBytes(const Job& job, int64_t begin, int64_t end, float* scratch) {
  if constexpr (digits <= V::kPanelDigits && (digits < 3 || bits < 8)) {
    job.layer->block() == 32 ? BytePanels<V, bits, digits, 32>(job, begin, end, scratch)
                             : BytePanels<V, bits, digits, 16>(job, begin, end, scratch);
  }
}

template <class V, int bits, int digits>
void RunMany(const Job& job, int64_t begin, int64_t end, float* scratch) {
  if (job.plan.float_panels) return FloatPanels<V, bits>(job, begin, end, scratch);
  RunBytes<V, bits, digits>(job, begin, end, scratch);
}

}  // namespace
}  // namespace qalora
