"""legalize-openvino: the compressed matrix products of OpenVINO, with real-valued zero-points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.config import PARAMETER_DTYPES, one_of
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.embedding import BlockEmbedding
from qalora_compile.ir.ops.experts import ExpertLinear
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.ops.target_kernels import GroupQuantLinear
from qalora_compile.ir.packing.kernel_layouts import GROUP_UNIT
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import EXPERT_LINEAR
from qalora_compile.ir.stages import LEGALIZED
from qalora_compile.passes.legalize.base import Layer, LegalizePass, Lowered, add_bias, pad_input
from qalora_compile.passes.legalize.legalize_ort import GroupLayout, lower_groups

_STORED = {2: 2, 3: 4, 4: 4, 8: 8}
"""Width of a code → width of the element type that holds it: `u2`, `u4` or `u8`."""
_STEP = 32


@dataclass(frozen=True, kw_only=True)
class LegalizeOpenvino(LegalizePass):
    """Rewrite every group_linear for OpenVINO, which takes real-valued zero-points.

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 3, 32)
    After:   %1 = qalora.group_quant_linear(%x, @fc.qweight, @fc.scale, @fc.zero_point, 4, 32, fp32)
             %2 = aten.add.Tensor(%1, @fc.bias)

    with the tensors of `legalize-ort`. OpenVINO has no 3-bit type, so 3-bit codes are stored in 4
    bits. The exporter writes each weight as Constant(u4) → Convert → Subtract(zero_point) →
    Multiply(scale) → Reshape, which OpenVINO's CPU plugin makes part of the product.

    Fires on: every group_linear, and every group_embedding, which becomes a
    `qalora.block_embedding`. Where groups are not a multiple of 16, or K is not a multiple of the
    group size, the stored groups and x are padded (`pad_groups`). Groups above 32 that are no
    multiple of 32 are stored as several of 16, as OpenVINO's kernels compute them wrongly.
    Leaves alone: adapters that were not folded.
    Exactness: exact in real arithmetic; zero_point is rounded once to float32. With
    `parameter_dtype="float16"`, scale and zero_point are rounded to float16.

    Options:
        parameter_dtype: As `ExportSpec.parameter_dtype`.
    """

    name: ClassVar[str] = "legalize-openvino"
    produces: ClassVar[str | None] = f"{LEGALIZED}openvino"
    kernel: ClassVar[str] = "the matrix product of OpenVINO"

    parameter_dtype: str = "float32"

    def __post_init__(self) -> None:
        one_of("parameter_dtype", self.parameter_dtype, PARAMETER_DTYPES)

    def requires(self, program: Program) -> None:
        """The model computes in float32 and has no stacked experts on codes.

        Raises:
            UnsupportedError: it has stacked experts, or computes in float64.
            PreconditionError: it computes in half precision, and was not widened.
        """
        super().requires(program)
        for node in program.graph.nodes:
            if node.target is EXPERT_LINEAR:
                raise UnsupportedError(
                    "stacked experts have no form in target openvino",
                    where=site_of(node) or node.name,
                    hint="target ort holds them",
                )

    def lower_weight(
        self, qweight: Tensor, scale: Tensor, offset: Tensor, layer: Layer
    ) -> dict[str, Tensor]:
        """Codes `[N, L, width · bits / 8]`, scale and zero-point `[N, L]`.

        Raises:
            UserInputError: a scale or zero-point does not fit float16.
        """
        dtype, bits = getattr(torch, self.parameter_dtype), _STORED[layer.bits]
        made = lower_groups(qweight, scale, offset, layer, dtype, bits)
        width, parts = _stored_width(layer), GroupLayout.choose(layer).width // _stored_width(layer)
        codes = made["qweight"].reshape(len(made["qweight"]), -1, width * bits // 8)
        rest = {
            name: made[name].repeat_interleave(parts, dim=1) for name in ("scale", "zero_point")
        }
        return {"qweight": codes} | rest

    def describe(self, layer: Layer) -> tuple[str, str]:
        """Element type and group size, and the padding and rounding."""
        layout = GroupLayout.choose(layer)
        why = "exact"
        if self.parameter_dtype == "float16":
            why = "scale and zero-point rounded to float16"
        if layout.padded:
            why += f"; groups of {layout.group_size} padded to {layout.width}"
        width = _stored_width(layer)
        if width != layout.width:
            why += f"; groups of {layout.width} stored as groups of {width}"
        return f"MatMul, u{_STORED[layer.bits]}, groups of {width}", why

    def emit(
        self, graph: fx.Graph, own: GroupLinear | ExpertLinear, layer: Layer, lowered: Lowered
    ) -> fx.Node:
        """The product, then the bias."""
        assert isinstance(own, GroupLinear), "stacked experts were refused"
        layout = GroupLayout.choose(layer)
        x = pad_input(graph, own.x, layout.group_size, layout.width, layout.padded)
        options = _STORED[layer.bits], _stored_width(layer), "fp32"
        return add_bias(
            graph, GroupQuantLinear.create(graph, x, *lowered.parts, *options), own.bias
        )

    def emit_rows(self, graph: fx.Graph, ids: fx.Node, layer: Layer, lowered: Lowered) -> fx.Node:
        """The lookup in the tensors of the product."""
        options = _STORED[layer.bits], _stored_width(layer), layer.k
        return BlockEmbedding.create(graph, ids, *lowered.parts, *options)


def _stored_width(layer: Layer) -> int:
    """Codes of a stored group, which is a padded group or an equal part of it.

    OpenVINO 2026.4 computes wrong products for groups above 32 that are no multiple of 32 (48, 80,
    112, 144), without an error: such a group is stored as groups of 16 with the same parameters.
    """
    width = GroupLayout.choose(layer).width
    return width if width % _STEP == 0 or width < _STEP else GROUP_UNIT
