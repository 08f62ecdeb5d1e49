"""The model-local functions of target `ort`, in ONNX's text syntax.

A node `qalora::GroupQuantLinear` means the same in every runtime:

* With this package's library, ONNX Runtime uses its kernel and ignores the functions.
* Without it, ONNX Runtime inlines `GroupQuantLinear`: its own MatMulNBits kernel on zero-points
  rounded to integers, and a correction of the rounding. Everything that depends on weights alone is
  computed once, when the session is created.
* Other runtimes have no kernel for MatMulNBits and inline its function in standard operators.

A callee precedes its caller in the model. Attributes that begin with `stock_` are read by the
functions alone: they say how MatMulNBits stores codes that it does not take unchanged.
"""

from __future__ import annotations

from typing import Any

from qalora_compile.optional import require

QALORA = "qalora"
MICROSOFT = "com.microsoft"
VERSION = 1
"""Version of the operator set `qalora`, see docs/operators.md."""

_HEAD = """
<domain: "{domain}", opset_import: ["" : {opset}{more}]>
"""

_MATMUL_NBITS = """
MatMulNBits <K, N, bits, block_size, accuracy_level> (A, B, scales, zero_points) => (Y)
{
   zero = Constant <value = int64[1] {0}> ()
   one = Constant <value = int64[1] {1}> ()
   eight = Constant <value = int64[1] {8}> ()
   last = Constant <value = int64[1] {-1}> ()
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

   two = Constant <value = float {2.0}> ()
   unit = Constant <value = float {1.0}> ()
   width_f = Cast <to = 1> (width)
   levels = Pow (two, width_f)
   largest = Sub (levels, unit)
   mask = Cast <to = 2> (largest)
   first = Constant <value = int64 {0}> ()
   step = Constant <value = int64 {1}> ()
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
   zero_bytes = Unsqueeze (zero_points, last)
   zero_shifted = BitShift <direction = "RIGHT"> (zero_bytes, shifts)
   zero_masked = BitwiseAnd (zero_shifted, mask)
   zero_rows = Reshape (zero_masked, rows)
   zero_codes = Slice (zero_rows, zero, blocks, one)
   zero_by_block = Unsqueeze (zero_codes, last)

   code = CastLike (codes, A)
   zero_code = CastLike (zero_by_block, A)
   level = Sub (code, zero_code)
   scale_rows = Reshape (scales, rows)
   scale = Unsqueeze (scale_rows, last)
   scaled = Mul (level, scale)
   padded = Reshape (scaled, rows)
   weight = Slice (padded, zero, k1, one)
   turned = Transpose <perm = [1, 0]> (weight)
   Y = MatMul (A, turned)
}
"""

# Sections: sizes; zero-points rounded to codes, and the correction; scales and zero-points per
# block; zero-points packed to bytes; codes, widened to 4 bits if stock_bits says so (`plain` holds
# the bytes that stay unchanged; either `plain` or `low` is empty); the layer.
_GROUP_QUANT_LINEAR = """
GroupQuantLinear <K, N, bits, group_size, compute,
                  stock_bits, stock_block_size, stock_accuracy_level>
(x, codes, scale, zero_point) => (y)
{
   zero = Constant <value = int64[1] {0}> ()
   one = Constant <value = int64[1] {1}> ()
   two = Constant <value = int64[1] {2}> ()
   eight = Constant <value = int64[1] {8}> ()
   last = Constant <value = int64[1] {-1}> ()
   zero_f = Constant <value = float {0.0}> ()
   one_f = Constant <value = float {1.0}> ()
   two_f = Constant <value = float {2.0}> ()
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

   scale_f = Cast <to = 1> (scale)
   zero_point_f = Cast <to = 1> (zero_point)
   stored_f = Cast <to = 1> (stored0)
   levels = Pow (two_f, stored_f)
   largest = Sub (levels, one_f)
   rounded = Round (zero_point_f)
   at_least = Max (rounded, zero_f)
   whole = Min (at_least, largest)
   rest = Sub (whole, zero_point_f)
   offset = Mul (scale_f, rest)
   turned = Transpose <perm = [1, 0]> (offset)
   correction = CastLike (turned, x)

   by_group = Concat <axis = 0> (n, groups, one)
   by_repeat = Concat <axis = 0> (one, one, repeats)
   by_block = Concat <axis = 0> (n, blocks)
   scale_x = CastLike (scale, x)
   scale_group = Reshape (scale_x, by_group)
   scale_repeat = Expand (scale_group, by_repeat)
   scale_block = Reshape (scale_repeat, by_block)
   whole_group = Reshape (whole, by_group)
   whole_repeat = Expand (whole_group, by_repeat)
   whole_block = Reshape (whole_repeat, by_block)

   per_byte = Div (eight, stored)
   over = Mod (blocks, per_byte)
   short = Sub (per_byte, over)
   missing = Mod (short, per_byte)
   fill = Concat <axis = 0> (zero, missing)
   filled = Pad (whole_block, fill, zero_f, last)
   by_byte = Concat <axis = 0> (n, last, per_byte)
   in_byte = Reshape (filled, by_byte)
   first = Constant <value = int64 {0}> ()
   step = Constant <value = int64 {1}> ()
   count = Squeeze (per_byte)
   places = Range (first, count, step)
   places_f = Cast <to = 1> (places)
   weights = Pow (levels, places_f)
   weighted = Mul (in_byte, weights)
   bytes_f = ReduceSum <keepdims = 0> (weighted, last)
   zero_bytes = Cast <to = 2> (bytes_f)

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
   whole_codes = Mul (units, unit_codes)
   tail_codes = Sub (wide_codes, whole_codes)
   tail_bytes = Div (tail_codes, four)
   by_unit = Concat <axis = 0> (n, units, four, unit_bytes)
   by_tail = Concat <axis = 0> (n, four, tail_bytes)
   as_whole = Concat <axis = 0> (n, whole_codes)
   as_tail = Concat <axis = 0> (n, tail_codes)
   high_whole = Slice (high_flat, zero, whole_codes, one)
   high_tail = Slice (high_flat, whole_codes, wide_codes, one)
   whole_units = Reshape <allowzero = 1> (high_whole, by_unit)
   tail_unit = Reshape <allowzero = 1> (high_tail, by_tail)
   whole_turned = Transpose <perm = [0, 1, 3, 2]> (whole_units)
   tail_turned = Transpose <perm = [0, 2, 1]> (tail_unit)
   whole_row = Reshape <allowzero = 1> (whole_turned, as_whole)
   tail_row = Reshape <allowzero = 1> (tail_turned, as_tail)
   high_row = Concat <axis = 1> (whole_row, tail_row)
   high_pairs = Reshape <allowzero = 1> (high_row, wide_pairs)
   high_placed = BitShift <direction = "LEFT"> (high_pairs, pair_shifts)
   high_even, high_odd = Split <axis = -1, num_outputs = 2> (high_placed)
   high_codes = BitwiseOr (high_even, high_odd)
   high_bytes = Squeeze (high_codes, last)
   widened = BitwiseOr (low_row, high_bytes)
   stored_row = Concat <axis = 1> (plain, widened)
   stored_by = Concat <axis = 0> (n, blocks, last)
   stored_codes = Reshape (stored_row, stored_by)

   product = com.microsoft.MatMulNBits <K: int = @K, N: int = @N, bits: int = @stock_bits,
      block_size: int = @stock_block_size, accuracy_level: int = @stock_accuracy_level>
      (x, stored_codes, scale_block, zero_bytes)
   lead = Shape <end = -1> (x)
   grouped = Concat <axis = 0> (lead, groups, group)
   x_groups = Reshape (x, grouped)
   sums = ReduceSum <keepdims = 0> (x_groups, last)
   corrected = MatMul (sums, correction)
   y = Add (product, corrected)
}
"""


def layered_functions(opset: int) -> list[Any]:
    """The functions as `onnx.FunctionProto`, callee first.

    Args:
        opset: Version of the standard operators that the model imports; 18 or newer.
    """
    parser = require("onnx", extra="onnx", purpose="export to ONNX").parser
    matmul = _HEAD.format(domain=MICROSOFT, opset=opset, more="") + _MATMUL_NBITS
    more = f', "{MICROSOFT}" : 1'
    linear = _HEAD.format(domain=QALORA, opset=opset, more=more) + _GROUP_QUANT_LINEAR
    return [parser.parse_function(text) for text in (matmul, linear)]
