"""legalize-ort-stock: MatMulNBits with integer zero-points, and a group-sum correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional

from qalora_compile.config import CORRECTIONS, STOCK_ACCURACY_LEVELS, one_of
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.lazy_tensor import holds
from qalora_compile.ir.ops.embedding import BlockEmbedding
from qalora_compile.ir.ops.experts import ExpertLinear, ExpertMatmulNBits
from qalora_compile.ir.ops.linear import GroupLinear, MatmulNBits
from qalora_compile.ir.packing.bitstream import pack_codes
from qalora_compile.ir.stages import LEGALIZED
from qalora_compile.passes.legalize.base import (
    Layer,
    LegalizePass,
    Lowered,
    add_correction,
    group_sums,
    pad_input,
)
from qalora_compile.passes.legalize.block_layout import BlockLayout, Blocks, to_blocks

_ATEN = torch.ops.aten
DIGITS = {0: 3, 4: 2}
"""Digits of C by accuracy level: enough that their error is below that of the kernel."""


@dataclass(frozen=True, kw_only=True)
class LegalizeOrtStock(LegalizePass):
    """Rewrite every group_linear for stock ONNX Runtime, whose kernels take integer zero-points.

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 4, 32)
    After:   %1 = qalora.matmul_nbits(%x, @fc.qweight, @fc.scale, @fc.zero_point, @fc.bias, 4, …)
             %2 = qalora.group_sum(%x, 32)
             %3 = aten.matmul(%2, @fc.correction)
             %4 = aten.add.Tensor(%1, %3)

    with `zero_point = clamp(round(−offset / scale))` and `correction = (offset + scale ·
    zero_point)ᵀ`, `[L, N]`, omitted if it is all zero. With `correction="digits"` the correction is
    further blocks of the same kernel, and the group-sums are appended to x once for each digit:

             %1 = qalora.group_sum(%x, 32)
             %2 = aten.cat([%x, %1, %1, %1], -1)
             %3 = qalora.matmul_nbits(%2, @fc.qweight, …)

    Fires on: every group_linear, and every expert_linear, which becomes one
    `qalora.expert_matmul_nbits`, and every group_embedding, which becomes a
    `qalora.block_embedding`; group sizes that no kernel takes are padded (`pad_groups`).
    Leaves alone: adapters that were not folded.
    Exactness: exact in real arithmetic for any group size, tail, scale and offset; the correction
    is rounded once to float32. Digits of b bits instead round it to about 2^(1 − b) per digit of
    its largest value in a block: three digits at accuracy level 0, two at level 4.

    Options:
        accuracy_level: As `ExportSpec.accuracy_level`.
        correction: As `ExportSpec.correction`.
    """

    name: ClassVar[str] = "legalize-ort-stock"
    produces: ClassVar[str | None] = f"{LEGALIZED}ort-stock"
    kernel: ClassVar[str] = "MatMulNBits"

    accuracy_level: int = 0
    correction: str = "fp32"

    def __post_init__(self) -> None:
        one_of("accuracy_level", self.accuracy_level, STOCK_ACCURACY_LEVELS)
        one_of("correction", self.correction, CORRECTIONS)

    def layout(self, layer: Layer) -> BlockLayout:
        """The blocks of a layer. The 2-bit float32 kernel is about 100 times slower than 4 bits."""
        narrow = self.accuracy_level != 0 and self.correction != "digits"
        return BlockLayout.choose(
            bits=layer.bits, group_size=layer.group_size, k=layer.k, narrow=narrow
        )

    def lower_weight(
        self, qweight: Tensor, scale: Tensor, offset: Tensor, layer: Layer
    ) -> dict[str, Tensor]:
        """Tensors of MatMulNBits and its correction."""
        layout, digits = self.layout(layer), self._digits(layer)
        return lower_weight(qweight, scale, offset, *layer[:3], layout, digits)

    def describe(self, layer: Layer) -> tuple[str, str]:
        """Kernel, bits and blocks."""
        layout = self.layout(layer)
        what = f"MatMulNBits, {layout.bits} bits, blocks of {layout.block_size}"
        why = layout.describe(layer.bits, layer.group_size)
        if digits := self._digits(layer):
            why += f"; correction as {digits} digits of {layout.bits} bits"
        return what, why

    def emit(
        self, graph: fx.Graph, own: GroupLinear | ExpertLinear, layer: Layer, lowered: Lowered
    ) -> fx.Node:
        """MatMulNBits, and its correction."""
        layout, correction, parts = self.layout(layer), lowered.correction, lowered.parts
        digits = self._digits(layer)
        options = layout.bits, layout.block_size, self.accuracy_level
        wide = pad_input(graph, own.x, layer.group_size, layout.width, layout.padded)
        sums = group_sums(graph, own.x, layer, correction is not None or digits > 0)
        if digits and sums is not None:
            wide, sums = self._append_sums(graph, wide, sums, layer), None
        if isinstance(own, ExpertLinear):
            more = (*parts, correction or [], own.group_offsets)
            return ExpertMatmulNBits.create(graph, wide, sums, *more, *options)
        y = MatmulNBits.create(graph, wide, *parts, own.bias, *options)
        return add_correction(graph, y, sums, correction)

    def emit_rows(self, graph: fx.Graph, ids: fx.Node, layer: Layer, lowered: Lowered) -> fx.Node:
        """The lookup in the tensors of MatMulNBits."""
        layout = self.layout(layer)
        return BlockEmbedding.create(
            graph, ids, *lowered.parts, layout.bits, layout.block_size, layer.k
        )

    def _digits(self, layer: Layer) -> int:
        """Digits of the correction, which integer zero-points do not need."""
        wanted = self.correction == "digits" and not layer.integer_zero_point
        return DIGITS[self.accuracy_level] if wanted else 0

    def _append_sums(self, graph: fx.Graph, x: fx.Node, sums: fx.Node, layer: Layer) -> fx.Node:
        """X with the group-sums appended once for each digit; each part fills complete blocks."""
        layout = self.layout(layer)
        groups = group_count(layer.k, layer.group_size)
        width = groups * layout.width if layout.padded else layer.k
        parts = [_pad_to_blocks(graph, x, width, layout.block_size)]
        parts += [_pad_to_blocks(graph, sums, groups, layout.block_size)] * self._digits(layer)
        return graph.call_function(_ATEN.cat.default, (parts, -1))


def _pad_to_blocks(graph: fx.Graph, x: fx.Node, width: int, block_size: int) -> fx.Node:
    if width % block_size == 0:
        return x
    return graph.call_function(_ATEN.constant_pad_nd.default, (x, [0, -width % block_size]))


def lower_weight(
    qweight: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    group_size: int,
    k: int,
    layout: BlockLayout,
    digits: int = 0,
) -> dict[str, Tensor]:
    """Tensors of MatMulNBits and its correction from packed codes, scale and offset.

    Returns:
        `qweight` `[N, Lb, block_size · bits / 8]` uint8; `scale` `[N, Lb]` float32; `zero_point`
        `[N, ceil(Lb · bits / 8)]` uint8; `correction` `[L, N]` float32 unless it is all zero. With
        `digits`, no correction but that many sets of further columns, in their own blocks.
    """
    blocks = to_blocks(qweight, scale, offset, bits, group_size, k, layout)
    if digits:
        blocks = _with_digits(blocks, layout, digits)
    n, count = blocks.scale.shape
    width = -(-count * layout.bits // 8)
    lowered = {
        "qweight": pack_codes(blocks.codes, layout.bits).reshape(n, count, -1),
        "scale": blocks.scale,
        "zero_point": pack_codes(blocks.zero_point, layout.bits)[:, :width].contiguous(),
    }
    stored = blocks.correction.float().contiguous()
    return lowered | ({"correction": stored} if holds(stored.any()) and not digits else {})


def _with_digits(blocks: Blocks, layout: BlockLayout, digits: int) -> Blocks:
    """Append C to the blocks, digit by digit: each digit encodes the remainder of the last one.

    A digit is rounded to the codes of its block, with a scale of its own and zero-point 2^(b − 1).
    """
    half = 2 ** (layout.bits - 1)
    rest = blocks.correction.t()
    rest = functional.pad(rest, (0, -rest.shape[1] % layout.block_size))
    rest = rest.unflatten(1, (-1, layout.block_size))
    codes, scales = [blocks.codes], [blocks.scale]
    for _ in range(digits):
        scale = (rest.abs().amax(-1, keepdim=True) / (half - 1)).float().double()
        safe = torch.where(scale == 0, 1.0, scale)
        digit = (rest / safe).round().clamp(-half, half - 1)
        rest = rest - digit * scale
        codes.append((digit + half).to(torch.uint8).flatten(1))
        scales.append(scale.squeeze(-1).float())
    more = sum(s.shape[1] for s in scales[1:])
    zero_point = functional.pad(blocks.zero_point, (0, more), value=half)
    return Blocks(torch.cat(codes, 1), torch.cat(scales, 1), zero_point, blocks.correction)
