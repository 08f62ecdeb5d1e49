"""What every kind of adapter offers to passes, training and the eager back-end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.experts import ExpertLinear
from qalora_compile.ir.ops.linear import GroupLinear, LinearOnCodes
from qalora_compile.ir.stages import ADAPTER_NAMES, CODE_NAMES

DROPOUT = torch.ops.aten.dropout.default
"""Stands between the group-sum and an adapter that drops inputs in training."""
Nodes = Sequence[fx.Node]
"""The nodes of what an adapter trains."""
Fold = Callable[..., dict[str, Tensor]]

OFFSET: tuple[str, ...] = ("offset",)
BOTH: tuple[str, ...] = ("scale", "offset")
"""The parameters that most adapters are folded into."""


@dataclass(frozen=True)
class AdapterSettings:
    """The constants of an adapter.

    Attributes:
        scaling: alpha / rank times the pooling factor f.
        pool: Width of a pooling group.
        dropout: Probability with which a pooled input is dropped in training.
    """

    scaling: float
    pool: int
    dropout: float = 0.0


@dataclass(frozen=True)
class Adapter(ABC):
    """One use of an adapter: the node that reads what it trains, and what surrounds it."""

    node: fx.Node

    reads: ClassVar[tuple[str, ...]]
    """Tensors that `fold` takes, by their names below the path of the weight."""
    moves: ClassVar[tuple[str, ...]] = OFFSET
    """Parameters of the layer that folding changes."""
    trains: ClassVar[tuple[str, ...]] = ADAPTER_NAMES
    """Tensors that are trained, by their names below the path of the weight."""
    unlike_pooled: ClassVar[str] = ""
    """What it does that pooled adapters, which alone PEFT and modules have, do not."""

    @classmethod
    @abstractmethod
    def insert(cls, graph: fx.Graph, layer: fx.Node, own: Nodes, settings: AdapterSettings) -> None:
        """Add an adapter to a quantized layer, whose readers then read the adapted output.

        `own`: the nodes of the tensors in `trains`.
        """

    @property
    @abstractmethod
    def trained(self) -> Nodes:
        """The nodes of the tensors in `trains`."""

    @property
    @abstractmethod
    def layer(self) -> GroupLinear | ExpertLinear:
        """The quantized layer that the adapter belongs to.

        Raises:
            PreconditionError: the graph around the adapter has no form that folds.
        """

    @property
    @abstractmethod
    def layer_node(self) -> fx.Node:
        """The node that computes the layer, alone or with its adapter.

        Raises:
            PreconditionError: see `layer`.
        """

    @property
    @abstractmethod
    def output(self) -> fx.Node:
        """The node that computes the adapted layer and carries the mark of its site."""

    @property
    @abstractmethod
    def settings(self) -> AdapterSettings:
        """What it computes with."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What it scales, pools and drops: adapters with equal texts train in the same way."""

    @property
    @abstractmethod
    def fold(self) -> Fold:
        """Computes the layer's parameters, with the adapter in them, from the tensors `reads`.

        It depends on no node: the graph may change before it is called.
        """

    @abstractmethod
    def remove(self, graph: fx.Graph) -> None:
        """Leave the layer alone in the place of the adapted one."""

    @property
    def path(self) -> str:
        """Path of the weight, below which the adapter's tensors lie."""
        return str(self.trained[0].target).rpartition(".")[0]

    @property
    def names(self) -> dict[str, str]:
        """The tensors of the layer and its adapter, by their names below the path."""
        layer = self.layer
        nodes = (layer.qweight, layer.scale, layer.offset, *self.trained)
        parts = (*CODE_NAMES, *self.trains)
        return {part: str(node.target) for part, node in zip(parts, nodes, strict=True)}

    @property
    def site(self) -> str | None:
        """Name of the site that the adapter belongs to."""
        return site_of(self.output)


def replace_node(old: fx.Node, new: fx.Node) -> None:
    """Put `new` in the place of `old`, with its site, and erase `old`."""
    move_site(old, new)
    old.replace_all_uses_with(new)
    erase_unread([old])


@dataclass(frozen=True)
class InLayer(Adapter):
    """An adapter that one operator computes together with its layer."""

    @property
    @abstractmethod
    def operands(self) -> LinearOnCodes:
        """The operands of the node."""

    @property
    def layer(self) -> GroupLinear:
        """The layer without its adapter; the graph does not hold it."""
        own = self.operands
        return GroupLinear(own.x, *own.weight)

    @property
    def layer_node(self) -> fx.Node:
        """The node itself."""
        return self.node

    @property
    def output(self) -> fx.Node:
        """The node itself."""
        return self.node

    def remove(self, graph: fx.Graph) -> None:
        """Put a quantized layer in the place of the operator."""
        with graph.inserting_before(self.node):
            plain = self.layer.insert(graph)
        replace_node(self.node, plain)
