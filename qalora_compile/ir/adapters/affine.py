"""Adapters that train scales with the offsets of a layer, and its codes too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from qalora_compile.ir.adapters.base import (
    BOTH,
    AdapterSettings,
    Fold,
    InLayer,
    Nodes,
    replace_node,
)
from qalora_compile.ir.ops.affine_linear import AffineLinear, affine_parameters, moved_codes
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.stages import ADAPTER_NAMES, CODE_NAMES, GAIN, SHIFT


@dataclass(frozen=True)
class AffineAdapter(InLayer):
    """`output = node = affine_linear(…)`: layer and adapter in one operator."""

    trains: ClassVar[tuple[str, ...]] = (*ADAPTER_NAMES, GAIN)
    reads: ClassVar[tuple[str, ...]] = (*BOTH, *trains)
    moves = BOTH
    unlike_pooled: ClassVar[str] = "train scales"

    @classmethod
    def insert(cls, graph: fx.Graph, layer: fx.Node, own: Nodes, settings: AdapterSettings) -> None:
        """Put one operator in the place of the layer."""
        (lora_a, lora_b, gain, *shift), plain = own, GroupLinear.of(layer)
        moved = lora_a, lora_b, gain, shift[0] if shift else None
        with graph.inserting_before(layer):
            adapted = AffineLinear.create(
                graph, plain.x, *plain.weight, *moved, settings.pool, settings.scaling
            )
        replace_node(layer, adapted)

    @property
    def operands(self) -> AffineLinear:
        """The operands of the node."""
        return AffineLinear.of(self.node)

    @property
    def trained(self) -> Nodes:
        """The nodes of A, B and G, and of U where codes train."""
        own = self.operands
        found = (own.lora_A, own.lora_B, own.gain)
        return found if own.shift is None else (*found, own.shift)

    @property
    def settings(self) -> AdapterSettings:
        """What it computes with."""
        return AdapterSettings(self.operands.scaling, self.operands.pool)

    @property
    def description(self) -> str:
        """What it multiplies and pools, and what of the layer it moves."""
        own = self.operands
        what = ", ".join(self.moves)
        return f"times {own.scaling} on the {what} of groups of {own.pool}"

    @property
    def fold(self) -> Fold:
        """What moves, as the forward computes it."""
        own = self.operands
        options = own.pool, own.group_size, own.scaling

        def compute(scale: Tensor, offset: Tensor, *trained: Tensor) -> dict[str, Tensor]:
            lora_a, lora_b, gain = (tensor.detach() for tensor in trained)
            made = affine_parameters(scale, offset, lora_a, lora_b, gain, *options)
            return dict(zip(BOTH, made, strict=True))

        return compute


@dataclass(frozen=True)
class TrainedCodes(AffineAdapter):
    """As `AffineAdapter`, and codes train as well."""

    trains = (*AffineAdapter.trains, SHIFT)
    reads = (*CODE_NAMES, *trains)
    moves = (*BOTH, "qweight")
    unlike_pooled = "train codes"

    @property
    def fold(self) -> Fold:
        """What moves, as the forward computes it."""
        bits, affine = self.operands.bits, super().fold

        def compute(qweight: Tensor, *tensors: Tensor) -> dict[str, Tensor]:
            *rest, shift = tensors
            return {"qweight": moved_codes(qweight, shift.detach(), bits)} | affine(*rest)

        return compute
