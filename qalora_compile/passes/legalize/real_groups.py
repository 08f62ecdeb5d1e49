"""`LegalizeRealGroups`: for runtimes whose weights are codes with real-valued zero-points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.embedding import BlockEmbedding
from qalora_compile.ir.ops.experts import ExpertLinear
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.ops.target_kernels import ExpertGroupQuantLinear, GroupQuantLinear
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import EXPERT_LINEAR
from qalora_compile.passes.legalize.base import Layer, LegalizePass, Lowered, add_bias, pad_input
from qalora_compile.passes.legalize.legalize_ort import GroupLayout, lower_groups


@dataclass(frozen=True, kw_only=True)
class LegalizeRealGroups(LegalizePass):
    """The base of passes whose layers are stored as for GroupQuantLinear, in the target's types.

    Every group_linear becomes a `qalora.group_quant_linear`, and every group_embedding a
    `qalora.block_embedding`, with the tensors of `legalize-ort`.
    """

    target: ClassVar[str]
    """Name of the target, for messages."""
    stored: ClassVar[Mapping[int, int]]
    """Width of a code → width of the unsigned element type that holds it."""
    product: ClassVar[str]
    """The operator that multiplies by the weight, for the list of changes."""
    holds_experts: ClassVar[bool] = False
    """Whether stacked experts become `qalora.expert_group_quant_linear`, or are refused."""

    @property
    def dtype(self) -> torch.dtype:
        """Of scale and zero-point."""
        return torch.float32

    def stored_width(self, layer: Layer) -> int:
        """Codes of a stored group: a padded group, or an equal part of it."""
        return GroupLayout.choose(layer).width

    def requires(self, program: Program) -> None:
        """The model computes in float32, and has no stacked experts that the target cannot hold.

        Raises:
            UnsupportedError: it has stacked experts, or computes in float64.
            PreconditionError: it computes in half precision, and was not widened.
        """
        super().requires(program)
        for node in program.graph.nodes:
            if node.target is EXPERT_LINEAR and not self.holds_experts:
                raise UnsupportedError(
                    f"stacked experts have no form in target {self.target}",
                    where=site_of(node) or node.name,
                    hint="targets ort and openvino hold them",
                )

    def lower_weight(
        self, qweight: Tensor, scale: Tensor, offset: Tensor, layer: Layer
    ) -> dict[str, Tensor]:
        """Codes `[N, L, width · bits / 8]`, scale and zero-point `[N, L]`.

        Raises:
            UserInputError: a scale or zero-point does not fit the dtype.
        """
        bits, width = self.stored[layer.bits], self.stored_width(layer)
        made = lower_groups(qweight, scale, offset, layer, self.dtype, bits)
        parts = GroupLayout.choose(layer).width // width
        codes = made["qweight"].reshape(len(made["qweight"]), -1, width * bits // 8)
        rest = {
            name: made[name].repeat_interleave(parts, dim=1) for name in ("scale", "zero_point")
        }
        return {"qweight": codes} | rest

    def describe(self, layer: Layer) -> tuple[str, str]:
        """Element type and group size, and the padding and rounding."""
        layout, width = GroupLayout.choose(layer), self.stored_width(layer)
        why = "exact"
        if self.dtype == torch.float16:
            why = "scale and zero-point rounded to float16"
        if layout.padded:
            why += f"; groups of {layout.group_size} padded to {layout.width}"
        if width != layout.width:
            why += f"; groups of {layout.width} stored as groups of {width}"
        return f"{self.product}, u{self.stored[layer.bits]}, groups of {width}", why

    def emit(
        self, graph: fx.Graph, own: GroupLinear | ExpertLinear, layer: Layer, lowered: Lowered
    ) -> fx.Node:
        """The product, then the bias."""
        layout = GroupLayout.choose(layer)
        x = pad_input(graph, own.x, layout.group_size, layout.width, layout.padded)
        options = self.stored[layer.bits], self.stored_width(layer), "fp32"
        if isinstance(own, ExpertLinear):
            ends = own.group_offsets
            return ExpertGroupQuantLinear.create(graph, x, *lowered.parts, ends, *options)
        return add_bias(
            graph, GroupQuantLinear.create(graph, x, *lowered.parts, *options), own.bias
        )

    def emit_rows(self, graph: fx.Graph, ids: fx.Node, layer: Layer, lowered: Lowered) -> fx.Node:
        """The lookup in the tensors of the product."""
        options = self.stored[layer.bits], self.stored_width(layer), layer.k
        return BlockEmbedding.create(graph, ids, *lowered.parts, *options)
