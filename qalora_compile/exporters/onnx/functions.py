"""The model-local functions of target `ort`, in ONNX's text syntax.

A node `qalora::GroupQuantLinear` means the same in every runtime:

* With this package's library, ONNX Runtime uses its kernel and ignores the functions.
* Without it, ONNX Runtime inlines `GroupQuantLinear`: its own MatMulNBits kernel on the zero-point
  in the middle of the codes, and a correction. Everything that depends on weights alone is computed
  once, when the session is created; so the fewer nodes do that, the sooner a session is ready.
* Other runtimes have no kernel for MatMulNBits and inline its function in standard operators.

`qalora::CachedAttention` is ONNX's Attention, computed by this package's library where it is there.

A callee precedes its caller in the model. Attributes that begin with `stock_` are read by the
functions alone: they say how MatMulNBits stores codes that it does not take unchanged, and state
sizes that a function would have to compute. ONNX Runtime has one function for each operator, so the
body has the steps that some layer of the model needs (`FunctionForm`), and no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qalora_compile.optional import require

QALORA = "qalora"
CACHED_ATTENTION = "CachedAttention"
MICROSOFT = "com.microsoft"
VERSION = 1
"""Version of the operator set `qalora`, see docs/operators.md."""

_HEAD = """
<domain: "{domain}", opset_import: ["" : {opset}{more}]>
"""

_MATMUL_NBITS = """
MatMulNBits <K, N, bits, block_size, accuracy_level> ({inputs}) => (Y)
{{
   zero = Constant <value = int64[1] {{0}}> ()
   one = Constant <value = int64[1] {{1}}> ()
   eight = Constant <value = int64[1] {{8}}> ()
   last = Constant <value = int64[1] {{-1}}> ()
   k = Constant <value_int: int = @K> ()
   n = Constant <value_int: int = @N> ()
   width = Constant <value_int: int = @bits> ()
   block = Constant <value_int: int = @block_size> ()
   n1 = Reshape (n, one)
   k1 = Reshape (k, one)
   width1 = Reshape (width, one)
   block1 = Reshape (block, one)
   almost = Sub (block1, one)
   over = Add (k1, almost)
   blocks = Div (over, block1)

   two = Constant <value = float {{2.0}}> ()
   unit = Constant <value = float {{1.0}}> ()
   width_f = Cast <to = 1> (width)
   levels = Pow (two, width_f)
   largest = Sub (levels, unit)
   mask = Cast <to = 2> (largest)
   first = Constant <value = int64 {{0}}> ()
   step = Constant <value = int64 {{1}}> ()
   per_byte1 = Div (eight, width1)
   per_byte = Squeeze (per_byte1)
   places = Range (first, per_byte, step)
   bit = Mul (places, width1)
   shifts = Cast <to = 2> (bit)

   rows = Concat <axis = 0> (n1, last)
   by_block = Concat <axis = 0> (n1, blocks, block1)
   bytes = Unsqueeze (B, last)
   shifted = BitShift <direction = "RIGHT"> (bytes, shifts)
   masked = BitwiseAnd (shifted, mask)
   codes = Reshape (masked, by_block)
{zero}
   code = CastLike (codes, A)
   zero_code = CastLike (zero_by_block, A)
   level = Sub (code, zero_code)
   scale_rows = Reshape (scales, rows)
   scale = Unsqueeze (scale_rows, last)
   scaled = Mul (level, scale)
   padded = Reshape (scaled, rows)
   weight = Slice (padded, zero, k1, one)
   transposed = Transpose <perm = [1, 0]> (weight)
   Y = MatMul (A, transposed)
}}
"""

_ZERO_STORED = """
   zero_bytes = Unsqueeze (zero_points, last)
   zero_shifted = BitShift <direction = "RIGHT"> (zero_bytes, shifts)
   zero_masked = BitwiseAnd (zero_shifted, mask)
   zero_rows = Reshape (zero_masked, rows)
   zero_codes = Slice (zero_rows, zero, blocks, one)
   zero_by_block = Unsqueeze (zero_codes, last)
"""
_ZERO_MIDDLE = """
   zero_by_block = Div (levels, two)
"""

_GROUP_QUANT_LINEAR = """
GroupQuantLinear <K, N, bits, group_size, compute, stock_bits, stock_block_size,
                  stock_accuracy_level, stock_middle, stock_groups>
(x, codes, scale, zero_point) => (y)
{{{types}
   middle = Constant <value_float: float = @stock_middle> ()
   rest = Sub (middle, {zero_point_f})
   offset = Mul ({scale_f}, rest)
   offset_t = Transpose <perm = [1, 0]> (offset)
{sizes}{blocks}{widen}{correction}
   product = com.microsoft.MatMulNBits <K: int = @K, N: int = @N, bits: int = @stock_bits,
      block_size: int = @stock_block_size, accuracy_level: int = @stock_accuracy_level>
      ({operands})
   by_group = Constant <value_ints: ints = @stock_groups> ()
   axis = Constant <value_ints = [-1]> ()
   x_groups = Reshape (x, by_group)
   sums = ReduceSum <keepdims = 0> (x_groups, axis)
   corrected = MatMul (sums, {correction_x})
   y = Add (product, corrected)
}}
"""

_CACHED_ATTENTION = """
CachedAttention <q_num_heads, kv_num_heads, scale>
(q, k, v, mask, past_key, past_value) => (y, present_key, present_value)
{
   y, present_key, present_value = Attention <q_num_heads: int = @q_num_heads,
      kv_num_heads: int = @kv_num_heads, scale: float = @scale>
      (q, k, v, mask, past_key, past_value)
}
"""

_TYPES_OF_PARAMETERS = """
   scale_float = Cast <to = 1> (scale)
   zero_point_float = Cast <to = 1> (zero_point)"""

_TYPES_OF_X = """
   scale_x = CastLike (scale, x)
   correction = CastLike (offset_t, x)
"""

_SIZES = """
   zero = Constant <value = int64[1] {0}> ()
   one = Constant <value = int64[1] {1}> ()
   two = Constant <value = int64[1] {2}> ()
   eight = Constant <value = int64[1] {8}> ()
   last = Constant <value = int64[1] {-1}> ()
   k0 = Constant <value_int: int = @K> ()
   n0 = Constant <value_int: int = @N> ()
   width0 = Constant <value_int: int = @bits> ()
   group0 = Constant <value_int: int = @group_size> ()
   stored0 = Constant <value_int: int = @stock_bits> ()
   block0 = Constant <value_int: int = @stock_block_size> ()
   k = Reshape (k0, one)
   n = Reshape (n0, one)
   width = Reshape (width0, one)
   group = Reshape (group0, one)
   stored = Reshape (stored0, one)
   block = Reshape (block0, one)
   groups = Div (k, group)
   repeats = Div (group, block)
   blocks = Mul (groups, repeats)
"""

# A group of several blocks: every block has the scale of its group.
_BLOCKS = """
   each_group = Concat <axis = 0> (n, groups, one)
   each_block = Concat <axis = 0> (one, one, repeats)
   by_block = Concat <axis = 0> (n, blocks)
   scale_group = Reshape ({scale_x}, each_group)
   scale_repeat = Expand (scale_group, each_block)
   scale_block = Reshape (scale_repeat, by_block)
   codes_by = Concat <axis = 0> (n, blocks, last)
   block_codes = Reshape (codes, codes_by)
"""

# Codes are widened to 4 bits if stock_bits says so. `plain` holds the bytes of a layer whose codes
# stay as they are; either `plain` or `low` is empty. The zero-point of every block is `middle`, the
# middle of the codes before they are widened, repeated in each byte.
_WIDEN = """
   rows = Concat <axis = 0> (n, last)
   row = Reshape (codes, rows)
   as_is = Equal (width, stored)
   keep = Cast <to = 7> (as_is)
   widen = Sub (one, keep)
   row_bits = Mul (k, width)
   row_bytes = Div (row_bits, eight)
   plain_end = Mul (row_bytes, keep)
   k_eighth = Div (k, eight)
   high_size = Mul (k_eighth, widen)
   low_size = Mul (high_size, two)
   low_end = Add (plain_end, low_size)
   plain = Slice (row, zero, plain_end, one)
   low = Slice (row, plain_end, low_end, one)
   high_given = Slice (row, low_end, row_bytes, one)
   given = Sub (row_bytes, low_end)
   absent = Sub (high_size, given)
   absent_fill = Concat <axis = 0> (zero, absent)
   no_bits = Constant <value = uint8 {0}> ()
   high = Pad (high_given, absent_fill, no_bits, last)
   low_shifts = Constant <value = uint8[2] {0, 4}> ()
   bit_shifts = Constant <value = uint8[8] {0, 1, 2, 3, 4, 5, 6, 7}> ()
   pair_shifts = Constant <value = uint8[2] {2, 6}> ()
   u1 = Constant <value = uint8 {1}> ()
   u2 = Constant <value = uint8 {2}> ()
   u3 = Constant <value = uint8 {3}> ()
   u12 = Constant <value = uint8 {12}> ()
   four = Constant <value = int64[1] {4}> ()
   unit_bytes = Constant <value = int64[1] {64}> ()
   unit_codes = Constant <value = int64[1] {256}> ()
   wide_size = Mul (low_size, two)
   wide_codes = Mul (low_size, four)
   wide_rows = Concat <axis = 0> (n, wide_size)
   wide_pairs = Concat <axis = 0> (n, wide_size, two)
   low_each = Unsqueeze (low, last)
   low_pair = BitShift <direction = "RIGHT"> (low_each, low_shifts)
   low_even = BitwiseAnd (low_pair, u3)
   low_odd = BitwiseAnd (low_pair, u12)
   low_moved = BitShift <direction = "LEFT"> (low_odd, u2)
   low_codes = BitwiseOr (low_even, low_moved)
   low_row = Reshape <allowzero = 1> (low_codes, wide_rows)
   high_each = Unsqueeze (high, last)
   high_shifted = BitShift <direction = "RIGHT"> (high_each, bit_shifts)
   high_bits = BitwiseAnd (high_shifted, u1)
   by_code = Concat <axis = 0> (n, wide_codes)
   high_flat = Reshape <allowzero = 1> (high_bits, by_code)
   units = Div (wide_codes, unit_codes)
   full_codes = Mul (units, unit_codes)
   tail_codes = Sub (wide_codes, full_codes)
   tail_bytes = Div (tail_codes, four)
   by_unit = Concat <axis = 0> (n, units, four, unit_bytes)
   by_tail = Concat <axis = 0> (n, four, tail_bytes)
   as_full = Concat <axis = 0> (n, full_codes)
   as_tail = Concat <axis = 0> (n, tail_codes)
   high_whole = Slice (high_flat, zero, full_codes, one)
   high_tail = Slice (high_flat, full_codes, wide_codes, one)
   full_units = Reshape <allowzero = 1> (high_whole, by_unit)
   tail_unit = Reshape <allowzero = 1> (high_tail, by_tail)
   full_swapped = Transpose <perm = [0, 1, 3, 2]> (full_units)
   tail_swapped = Transpose <perm = [0, 2, 1]> (tail_unit)
   full_row = Reshape <allowzero = 1> (full_swapped, as_full)
   tail_row = Reshape <allowzero = 1> (tail_swapped, as_tail)
   high_row = Concat <axis = 1> (full_row, tail_row)
   high_pairs = Reshape <allowzero = 1> (high_row, wide_pairs)
   high_placed = BitShift <direction = "LEFT"> (high_pairs, pair_shifts)
   high_even, high_odd = Split <axis = -1, num_outputs = 2> (high_placed)
   high_codes = BitwiseOr (high_even, high_odd)
   high_bytes = Squeeze (high_codes, last)
   widened = BitwiseOr (low_row, high_bytes)
   stored_row = Concat <axis = 1> (plain, widened)
   stored_by = Concat <axis = 0> (n, blocks, last)
   stored_codes = Reshape (stored_row, stored_by)
   stored_f = Cast <to = 1> (stored0)
   two_f = Constant <value = float {2.0}> ()
   step_f = Pow (two_f, stored_f)
   full_f = Constant <value = float {255.0}> ()
   one_f = Constant <value = float {1.0}> ()
   largest_f = Sub (step_f, one_f)
   ones_f = Div (full_f, largest_f)
   middle_byte_f = Mul (middle, ones_f)
   middle_byte = Cast <to = 2> (middle_byte_f)
   zero_bits = Mul (blocks, stored)
   seven = Sub (eight, one)
   zero_bits_up = Add (zero_bits, seven)
   zero_size = Div (zero_bits_up, eight)
   zero_shape = Concat <axis = 0> (n, zero_size)
   zero_bytes = Expand (middle_byte, zero_shape)
"""


@dataclass(frozen=True, kw_only=True)
class FunctionForm:
    """What the layers of a model need of the function.

    Attributes:
        half_parameters: Scales and zero-points are not float32.
        half_inputs: x is not float32, or its type is not known.
        blocks: A group of some layer is stored as several blocks.
        widen: MatMulNBits stores the codes of some layer in more bits.
    """

    half_parameters: bool = False
    half_inputs: bool = False
    blocks: bool = False
    widen: bool = False

    @property
    def zero_points(self) -> bool:
        """Whether MatMulNBits is given zero-points; else they are the middle of its codes."""
        return self.widen


def layered_functions(opset: int, form: FunctionForm) -> list[Any]:
    """The functions as `onnx.FunctionProto`, callee first.

    Args:
        opset: Version of the standard operators that the model imports; 18 or newer.
        form: What the layers of the model need.
    """
    parser = require("onnx", extra="onnx", purpose="export to ONNX").parser
    matmul = _HEAD.format(domain=MICROSOFT, opset=opset, more="") + _matmul_nbits(form)
    more = f', "{MICROSOFT}" : 1'
    linear = _HEAD.format(domain=QALORA, opset=opset, more=more) + _group_quant_linear(form)
    return [parser.parse_function(text) for text in (matmul, linear)]


def attention_function(opset: int) -> Any:
    """The function of CachedAttention, ONNX's Attention, as `onnx.FunctionProto`.

    Args:
        opset: Version of the standard operators that the model imports; 23 or newer.
    """
    parser = require("onnx", extra="onnx", purpose="export to ONNX").parser
    return parser.parse_function(
        _HEAD.format(domain=QALORA, opset=opset, more="") + _CACHED_ATTENTION
    )


def _matmul_nbits(form: FunctionForm) -> str:
    inputs = ["A", "B", "scales"] + ["zero_points"] * form.zero_points
    zero = _ZERO_STORED if form.zero_points else _ZERO_MIDDLE
    return _MATMUL_NBITS.format(inputs=", ".join(inputs), zero=zero)


def _group_quant_linear(form: FunctionForm) -> str:
    types = form.half_parameters or form.half_inputs
    suffix = "_float" if types else ""
    scale_x = "scale_x" if form.half_inputs else f"scale{suffix}"
    codes = "stored_codes" if form.widen else "block_codes" if form.blocks else "codes"
    operands = ["x", codes, "scale_block" if form.blocks else scale_x]
    return _GROUP_QUANT_LINEAR.format(
        types=_TYPES_OF_PARAMETERS if types else "",
        zero_point_f=f"zero_point{suffix}",
        scale_f=f"scale{suffix}",
        correction=_TYPES_OF_X if form.half_inputs else "",
        correction_x="correction" if form.half_inputs else "offset_t",
        sizes=_SIZES if form.blocks or form.widen else "",
        blocks=_BLOCKS.format(scale_x=scale_x) if form.blocks else "",
        widen=_WIDEN if form.widen else "",
        operands=", ".join(operands + ["zero_bytes"] * form.zero_points),
    )
