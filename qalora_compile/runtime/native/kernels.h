// The interface between the driver (linear.cc) and the levels (scalar, avx2, avx512, amx, neon, ...).
//
// Activations are split into `digits` signed digits of 7 bits: x = s (d1 128^(digits - 1) + ... ), with
// one scale s for each block. Products of digits with codes are exact integers. With three digits the
// result is as good as float32's, docs/reference/operators.md gives the bound.
//
// A level works in steps: `step_bytes` bytes of the low part of a row of codes, as `lanes` 32-bit
// lanes. A lane holds codes of one group only, because a group has a multiple of 16 codes. The driver
// prepares activations once per block of rows in the order in which a step's codes fall out of its
// lanes, so that the loop over weight rows moves no activation around.
#pragma once

#include <cstdint>

#include "layer.h"

#if defined(__x86_64__) || defined(_M_X64)
#define QALORA_X86 1
#elif defined(__aarch64__)
#define QALORA_ARM64 1
#endif

namespace qalora {

// Rows of x in one block: bounds the workspace, and is how often weights are decoded again.
constexpr int64_t kMaxBlockRows = 256;
// Rows of weights that one task of the thread pool takes.
constexpr int64_t kTaskRows = 64;
// 3-bit rows have 2-bit codes first, then a plane with the high bits. Its unit covers so many bytes
// of the low part (the last of a row may cover fewer, a multiple of 4): for u bytes, bit f * u + i of
// the unit is the high bit of field f of byte i. So the bits of one field lie together, as a mask.
constexpr int64_t kUnitBytes = 64;
// Rows of x from which weights are unpacked into panels; fewer rows are multiplied straight from the
// codes.
constexpr int64_t kPanelRows = 8;
// Codes of a weight row in one panel: of bytes, and of floats. A panel stays in the L1 or L2 cache.
constexpr int64_t kBytePanelCodes = 1024;
constexpr int64_t kFloatPanelCodes = 256;
// Floats by which per-group and per-block buffers are longer, so that vector loads stay inside.
constexpr int64_t kGroupPadding = 32;
// Bytes of codes, and scales and zero-points, that kernels may read past a row where the tensors have
// them: a vector.
constexpr int64_t kPastRow = 64;
constexpr int64_t kPastGroups = 16;

// Which group each lane of a sequence of vectors of blocks belongs to; the same for all rows. Lanes
// past the end of a row have the last group.
struct LaneMap {
  const int32_t* first = nullptr;  // [vectors]: lowest group of the vector
  const int32_t* lane = nullptr;   // [vectors, lanes]: group of the lane minus first
};

// Sizes that follow from a layer and a level.
struct Plan {
  int64_t steps = 0;         // per row
  int64_t step_codes = 0;    // codes in a step
  int64_t lanes = 0;         // floats in a vector of the level
  int64_t group_floats = 0;  // floats of one per-group buffer, padding included
  int64_t blocks = 0;        // of activations in a row: padded K / Layer::block()
  int64_t block_lanes = 0;   // lanes of a step that one block takes: so many steps are a vector of blocks
  int64_t block_floats = 0;  // floats of one per-block buffer, padding included
  int64_t digits = 0;        // as Layer::digits
  int64_t inside_rows = 0;   // weight rows that kPastRow and kPastGroups more are behind
  bool float_panels = false;  // many rows are multiplied by panels of floats
  int64_t prepared() const { return steps * step_codes; }  // activations of a row, zero-padded
  int64_t pitch() const { return prepared() * digits; }    // digits of a row
};

// One block of rows of x against the entire weight.
struct Job {
  const Layer* layer = nullptr;
  Plan plan;
  LaneMap blocks;  // groups of blocks, a vector of lanes at a time
  const int32_t* step_blocks = nullptr;  // [block_lanes, lanes]: of a vector of blocks, the one of each
                                         // lane of its steps
  const uint8_t* codes = nullptr;
  const void* scale = nullptr;       // [N, L], float or half
  const void* zero_point = nullptr;  // [N, L], as scale
  bool half_parameters = false;
  const float* bias = nullptr;  // [N] or null
  int64_t rows = 0;             // of x in this block, 1 to kMaxBlockRows
  const float* x = nullptr;     // [rows, K], as given
  int8_t* quantized = nullptr;  // [rows, pitch]: few rows: [steps, digits, planes of a step];
                                // panels: [blocks, digits, codes of a block in the panel's order],
                                // or in tiles of rows, see panel_layout.h
  float* block_scale = nullptr; // [rows, block_floats], of the last digit
  float* block_sum = nullptr;   // few rows: [rows, block_floats], minus the sums of the digits
  float* group_sum = nullptr;   // panels: [rows, group_floats]: sums of the quantized x in each group
  float* y = nullptr;           // [rows, N]
  bool few() const { return rows < kPanelRows; }
  // Panels of floats take x as it is.
  bool float_panels() const { return !few() && plan.float_panels; }
};

// Sizes of one call of CachedAttention. The sizes of tensors that exist: their products fit int64.
struct AttentionShape {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t queries = 0;  // S, also new keys
  int64_t past = 0;     // P
  int64_t past_rows = 0;     // of past_key for each head: P, or more in a buffer that is shared
  int64_t present_rows = 0;  // of present_key: T, or past_rows of such a buffer
  int64_t width = 0;         // D
  int64_t value_width = 0;
  int64_t mask_batch = 0;  // 1 or batch
  int64_t mask_heads = 0;  // 1 or heads
  bool bool_mask = false;
  int64_t total() const { return past + queries; }        // T
  int64_t sharing() const { return heads / kv_heads; }    // heads of q that share one of keys
  int64_t rows() const { return queries * sharing(); }    // of q that read one head's keys
};

struct AttentionJob {
  AttentionShape shape;
  float scale = 1.0f;
  const float* q = nullptr;           // [batch, S, heads * D]
  const float* k = nullptr;           // [batch, S, kv_heads * D]
  const float* v = nullptr;           // [batch, S, kv_heads * Dv]
  const void* mask = nullptr;         // [mask_batch, mask_heads, S, T], bytes or floats
  const float* past_key = nullptr;    // [batch, kv_heads, past_rows, D]
  const float* past_value = nullptr;  // [batch, kv_heads, past_rows, Dv]
  float* y = nullptr;                 // [batch, S, heads * Dv]
  float* present_key = nullptr;       // [batch, kv_heads, present_rows, D], may be past_key
  float* present_value = nullptr;     // [batch, kv_heads, present_rows, Dv], may be past_value
};

// A part of a call: rows [begin, end) of the queries of one head of keys. Row r is query r / sharing
// of head r % sharing among those that share the keys.
struct AttentionPart {
  int64_t batch = 0;
  int64_t kv_head = 0;
  int64_t begin = 0;
  int64_t end = 0;
  // Copy past and new keys and values to the present ones, on the way.
  bool append = false;
  // Read all keys and values from the present ones, which are complete.
  bool appended = false;
};

// Rows of queries that share the loads of a key.
constexpr int64_t kAttentionTile = 4;
// Keys and values after which what was read is copied and sums are added up.
constexpr int64_t kAttentionBlock = 64;

// One instruction set's kernels. Functions touch no memory but what the job names and `scratch`.
struct KernelSet {
  const char* name;
  int64_t step_bytes;
  int64_t lanes;
  // The most digits with which many rows are faster than in float32.
  int panel_digits;
  // Fill the prepared arrays of one row of x.
  void (*prepare)(const Job& job, int64_t row, float* scratch);
  // y[:, begin:end] of the block.
  void (*run)(const Job& job, int64_t begin, int64_t end, float* scratch);
  void (*widen)(const uint16_t* from, float* to, int64_t count);
  void (*narrow)(const float* from, uint16_t* to, int64_t count);
  void (*attend)(const AttentionJob& job, const AttentionPart& part, float* scratch);
};

// Floats that `attend` needs as scratch, 64-byte aligned.
int64_t AttentionScratchFloats(const AttentionShape& shape);

// Floats that `prepare` and `run` need as scratch, 64-byte aligned, for `rows` of x.
int64_t ScratchFloats(const Layer& layer, const Plan& plan, int64_t rows);

extern const KernelSet kScalarKernels;
#if defined(QALORA_X86)
extern const KernelSet kAvx2Kernels;
const KernelSet* AvxVnniKernels();  // null where the compiler does not know the instructions
extern const KernelSet kAvx512Kernels;
const KernelSet* AmxKernels();  // null as before, and on systems other than Linux
// Asks Linux for the tiles of a CPU that has them and tries them: null, or why they are not used.
const char* AmxProblem();
#endif
#if defined(QALORA_ARM64)
extern const KernelSet kNeonKernels;
const KernelSet* I8mmKernels();  // null where the compiler does not know the instructions
#endif

}  // namespace qalora
