"""legalize-onnx: blocked DequantizeLinear and MatMul, standard operators only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from qalora_compile.ir.lazy_tensor import holds
from qalora_compile.ir.ops.embedding import FlatEmbedding
from qalora_compile.ir.ops.experts import ExpertLinear
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.ops.target_kernels import ExpertMatmulBlocks, MatmulBlocks, flat_width
from qalora_compile.ir.packing.bitstream import pack_codes
from qalora_compile.ir.stages import LEGALIZED
from qalora_compile.passes.legalize.base import (
    Layer,
    LegalizePass,
    Lowered,
    add_bias,
    add_correction,
    group_sums,
    pad_input,
)
from qalora_compile.passes.legalize.block_layout import BlockLayout, to_blocks


@dataclass(frozen=True, kw_only=True)
class LegalizeOnnx(LegalizePass):
    """Rewrite every group_linear for runtimes that know standard ONNX only, opset 21 or newer.

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 4, 32)
    After:   %1 = qalora.matmul_blocks(%x, @fc.qweight, @fc.scale, @fc.zero_point, 4, 32)
             %2 = qalora.group_sum(%x, 32)
             %3 = aten.matmul(%2, @fc.correction)
             %4 = aten.add.Tensor(%1, %3)
             %5 = aten.add.Tensor(%4, @fc.bias)

    with integer zero-points and the correction of legalize-ort-stock, in the same blocks, so that
    ONNX Runtime fuses each DequantizeLinear and MatMul into MatMulNBits.

    Fires on: every group_linear, and every expert_linear, which becomes one
    `qalora.expert_matmul_blocks`, and every group_embedding, which becomes a
    `qalora.flat_embedding`.
    Leaves alone: adapters that were not folded.
    Exactness: as legalize-ort-stock. 2-bit and 3-bit codes are stored as UINT4, the smallest type
    of opset 21.
    """

    name: ClassVar[str] = "legalize-onnx"
    produces: ClassVar[str | None] = f"{LEGALIZED}onnx"
    kernel: ClassVar[str] = "DequantizeLinear"
    by_rows: ClassVar[bool] = False  # a weight is stored transposed, [K, N]
    shares_scale: ClassVar[bool] = False  # ONNX Runtime would not fuse MatMulNBits

    def layout(self, layer: Layer) -> BlockLayout:
        """The blocks of a layer."""
        return BlockLayout.choose(
            bits=layer.bits, group_size=layer.group_size, k=layer.k, narrow=False
        )

    def lower_weight(
        self, qweight: Tensor, scale: Tensor, offset: Tensor, layer: Layer
    ) -> dict[str, Tensor]:
        """Tensors of DequantizeLinear, and the correction.

        Returns:
            `qweight` and `zero_point`, flat uint8, the raw data of the `[K, N]` and `[Lb, N]`
            tensors; `scale` `[Lb, N]` and `correction` `[L, N]` float32, the latter unless zero.
        """
        layout = self.layout(layer)
        blocks = to_blocks(qweight, scale, offset, *layer[:3], layout)
        rows = scale.shape[1] * layout.width if layout.padded else layer.k
        lowered = {
            "qweight": pack_flat(blocks.codes[:, :rows].t(), layout.bits),
            "scale": blocks.scale.t().contiguous(),
            "zero_point": pack_flat(blocks.zero_point.t(), layout.bits),
        }
        stored = blocks.correction.float().contiguous()
        return lowered | ({"correction": stored} if holds(stored.any()) else {})

    def describe(self, layer: Layer) -> tuple[str, str]:
        """Type and blocks."""
        layout = self.layout(layer)
        what = f"DequantizeLinear, UINT{layout.bits}, blocks of {layout.block_size}"
        return what, layout.describe(layer.bits, layer.group_size)

    def emit(
        self, graph: fx.Graph, own: GroupLinear | ExpertLinear, layer: Layer, lowered: Lowered
    ) -> fx.Node:
        """The product, its correction and the bias."""
        layout, correction, parts = self.layout(layer), lowered.correction, lowered.parts
        options = layout.bits, layout.block_size
        wide = pad_input(graph, own.x, layer.group_size, layout.width, layout.padded)
        sums = group_sums(graph, own.x, layer, correction is not None)
        if isinstance(own, ExpertLinear):
            more = (*parts, correction or [], own.group_offsets)
            return ExpertMatmulBlocks.create(graph, wide, sums, *more, *options)
        y = MatmulBlocks.create(graph, wide, *parts, *options)
        return add_bias(graph, add_correction(graph, y, sums, correction), own.bias)

    def emit_rows(self, graph: fx.Graph, ids: fx.Node, layer: Layer, lowered: Lowered) -> fx.Node:
        """The lookup in the tensors of DequantizeLinear."""
        layout = self.layout(layer)
        return FlatEmbedding.create(
            graph, ids, *lowered.parts, layout.bits, layout.block_size, layer.k
        )


def pack_flat(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape as one stream of bits, as ONNX stores a tensor of small integers."""
    width = flat_width(codes.numel(), bits)
    return pack_codes(codes.reshape(1, -1), bits)[0, :width].contiguous()
