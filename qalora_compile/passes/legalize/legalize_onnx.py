"""legalize-onnx: blocked DequantizeLinear and MatMul, standard operators throughout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from qalora_compile.ir.lazy_tensor import holds
from qalora_compile.ir.ops.target_kernels import flat_width
from qalora_compile.ir.packing.bitstream import pack_codes
from qalora_compile.ir.spec import (
    EXPERT_LINEAR,
    EXPERT_MATMUL_BLOCKS,
    FLAT_EMBEDDING,
    MATMUL_BLOCKS,
)
from qalora_compile.ir.stages import LEGALIZED
from qalora_compile.passes.legalize.base import (
    Layer,
    LegalizePass,
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
    ONNX Runtime makes MatMulNBits of each DequantizeLinear and MatMul.

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
    by_rows: ClassVar[bool] = False  # a weight is stored turned, [K, N]
    shares_scale: ClassVar[bool] = False  # ONNX Runtime then makes no MatMulNBits

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
        self,
        graph: fx.Graph,
        node: fx.Node,
        layer: Layer,
        stored: Callable[[str], fx.Node | list[fx.Node] | None],
    ) -> fx.Node:
        """The product, its correction and the bias."""
        x, last = node.args[0], node.args[4]
        layout, correction = self.layout(layer), stored("correction")
        operands = [stored(name) for name in ("qweight", "scale", "zero_point")]
        options = (layout.bits, layout.block_size)
        wide = pad_input(graph, x, layer.group_size, layout.width, layout.padded)
        sums = group_sums(graph, x, layer, correction is not None)
        if node.target is EXPERT_LINEAR:
            more = (wide, sums, *operands, correction or [], last)
            return graph.call_function(EXPERT_MATMUL_BLOCKS, (*more, *options))
        y = graph.call_function(MATMUL_BLOCKS, (wide, *operands, *options))
        return add_bias(graph, add_correction(graph, y, sums, correction), last)

    def emit_rows(
        self,
        graph: fx.Graph,
        node: fx.Node,
        layer: Layer,
        stored: Callable[[str], fx.Node | list[fx.Node] | None],
    ) -> fx.Node:
        """The lookup in the tensors of DequantizeLinear."""
        layout = self.layout(layer)
        operands = [stored(name) for name in ("qweight", "scale", "zero_point")]
        more = (layout.bits, layout.block_size, layer.k)
        return graph.call_function(FLAT_EMBEDDING, (node.args[0], *operands, *more))


def pack_flat(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape as one stream of bits, as ONNX stores a tensor of small integers."""
    width = flat_width(codes.numel(), bits)
    return pack_codes(codes.reshape(1, -1), bits)[0, :width].contiguous()
