"""Adapters inside a layer with integer zero-points, which move its zero-points or its scales."""

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
from qalora_compile.ir.ops.integer_zero_linear import (
    INTEGER,
    SCALE,
    IntegerZeroLinear,
    integer_zero_parameters,
)
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.stages import ADAPTER_NAMES


@dataclass(frozen=True)
class IntegerZero(InLayer):
    """`output = node = integer_zero_linear(…)`: layer and adapter in one operator."""

    reads = (*BOTH, *ADAPTER_NAMES)
    unlike_pooled = "keep zero-points integers"
    kind: ClassVar[str] = INTEGER

    @classmethod
    def insert(cls, graph: fx.Graph, layer: fx.Node, own: Nodes, settings: AdapterSettings) -> None:
        """Put one operator in the place of the layer."""
        (lora_a, lora_b), plain = own, GroupLinear.of(layer)
        with graph.inserting_before(layer):
            adapted = IntegerZeroLinear.create(
                graph, plain.x, *plain.weight, lora_a, lora_b, settings.scaling, cls.kind
            )
        replace_node(layer, adapted)

    @property
    def operands(self) -> IntegerZeroLinear:
        """The operands of the node."""
        return IntegerZeroLinear.of(self.node)

    @property
    def trained(self) -> Nodes:
        """The nodes of A and B."""
        return self.operands.lora_A, self.operands.lora_B

    @property
    def settings(self) -> AdapterSettings:
        """What it computes with: it pools the groups of its codes."""
        return AdapterSettings(self.operands.scaling, self.operands.group_size)

    @property
    def description(self) -> str:
        """What it multiplies, and what of the layer it moves."""
        own = self.operands
        return f"times {own.scaling} on the {own.kind} of groups of {own.group_size}"

    @property
    def fold(self) -> Fold:
        """Scale and offset, as the forward computes them."""
        own = self.operands
        options = own.bits, own.scaling, own.kind

        def compute(scale: Tensor, offset: Tensor, *lora: Tensor) -> dict[str, Tensor]:
            lora_a, lora_b = (tensor.detach() for tensor in lora)
            made = integer_zero_parameters(scale, offset, lora_a, lora_b, *options)
            return dict(zip(BOTH, made, strict=True))

        return compute


@dataclass(frozen=True)
class TrainedScale(IntegerZero):
    """As `IntegerZero`, but what is trained are the scales."""

    moves = BOTH
    kind = SCALE
