"""The adapters in a program's graph: one class for each kind, one interface for all.

===================  ======================  ==========================================  ==========
class                operator                what it computes                            changes
===================  ======================  ==========================================  ==========
`AddedAdapter`       `pooled_adapter`        an update that is added to a group_linear   offset
`ExpertsAdapter`     `expert_adapter`        the same for each of stacked experts        offset
`IntegerZero`        `integer_zero_linear`   a layer with integer zero-points            offset
`TrainedScale`       `integer_zero_linear`   a layer whose scales are trained            both
===================  ======================  ==========================================  ==========

The last column says which parameters of the layer the adapter is folded into.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.errors import InternalError, PreconditionError
from qalora_compile.ir.affine import expand_groups
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.experts import ExpertAdapter, ExpertLinear
from qalora_compile.ir.ops.integer_zero_linear import (
    INTEGER,
    SCALE,
    IntegerZeroLinear,
    integer_zero_parameters,
)
from qalora_compile.ir.ops.linear import GroupLinear, GroupSum, PooledAdapter
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.stages import ADAPTER_NAMES

DROPOUT = torch.ops.aten.dropout.default
"""Stands between the group-sum and an adapter that drops inputs in training."""
Lora = tuple[fx.Node, fx.Node]
"""The nodes of A and B."""
Fold = Callable[..., dict[str, Tensor]]
_ADD = torch.ops.aten.add.Tensor
_OFFSET = ("offset",)
_BOTH = ("scale", "offset")


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
    """One use of an adapter: the node that reads A and B, and what surrounds it."""

    node: fx.Node

    reads: ClassVar[tuple[str, ...]]
    """Tensors that `fold` takes, by their names below the path of the weight."""
    moves: ClassVar[tuple[str, ...]] = _OFFSET
    """Parameters of the layer that folding changes."""
    keeps_integer_zero_point: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def insert(cls, graph: fx.Graph, layer: fx.Node, lora: Lora, settings: AdapterSettings) -> None:
        """Add an adapter to a quantized layer, whose readers then read the adapted output."""

    @property
    @abstractmethod
    def lora(self) -> Lora:
        """The nodes of A and B."""

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
        """Path of the weight, below which A and B lie."""
        return str(self.lora[0].target).rpartition(".")[0]

    @property
    def names(self) -> dict[str, str]:
        """The tensors of the layer and its adapter, by their names below the path."""
        layer = self.layer
        nodes = (layer.scale, layer.offset, *self.lora)
        parts = (*_BOTH, *ADAPTER_NAMES)
        return {part: str(node.target) for part, node in zip(parts, nodes, strict=True)}

    @property
    def site(self) -> str | None:
        """Name of the site that the adapter belongs to."""
        return site_of(self.output)


@dataclass(frozen=True)
class AddedAdapter(Adapter):
    """`output = layer + node`, `node = pooled_adapter(dropout(group_sum(x)), A, B, scaling)`.

    The dropout may be absent.
    """

    reads = ("offset", *ADAPTER_NAMES)
    layer_view: ClassVar[type[GroupLinear] | type[ExpertLinear]] = GroupLinear

    @classmethod
    def insert(cls, graph: fx.Graph, layer: fx.Node, lora: Lora, settings: AdapterSettings) -> None:
        """Add an update to the layer."""
        with graph.inserting_after(layer):
            total = graph.call_function(_ADD, (layer, layer))
        layer.replace_all_uses_with(total)
        with graph.inserting_before(total):
            pooled = GroupSum.create(graph, argument(layer, "x"), settings.pool)
            if settings.dropout:
                pooled = graph.call_function(DROPOUT, (pooled, settings.dropout, False))
            update = cls._update(graph, layer, pooled, lora, settings.scaling)
        total.args = (layer, update)
        move_site(layer, total)

    @classmethod
    def _update(
        cls,
        graph: fx.Graph,
        layer: fx.Node,
        pooled: fx.Node,
        lora: Lora,
        scaling: float,
    ) -> fx.Node:
        return PooledAdapter.create(graph, pooled, *lora, scaling)

    @property
    def operands(self) -> PooledAdapter | ExpertAdapter:
        """The operands of the node."""
        return PooledAdapter.of(self.node)

    @property
    def lora(self) -> Lora:
        """The nodes of A and B."""
        return self.operands.lora_A, self.operands.lora_B

    @property
    def dropped(self) -> fx.Node | None:
        """The dropout before the adapter."""
        pooled = self.operands.pooled
        return pooled if pooled.target is DROPOUT else None

    @property
    def pooled(self) -> GroupSum | None:
        """The group-sum that the adapter takes; None where it takes something else."""
        dropped = self.dropped
        pooled = self.operands.pooled if dropped is None else argument(dropped, "input")
        return GroupSum.of(pooled) if pooled.target is GroupSum.target else None

    @property
    def settings(self) -> AdapterSettings:
        """What it computes with."""
        if self.pooled is None:
            raise InternalError("an adapter takes no group-sum", where=f"node {self.node.name}")
        dropout = 0.0 if self.dropped is None else argument(self.dropped, "p")
        return AdapterSettings(self.operands.scaling, self.pooled.group_size, dropout)

    @property
    def description(self) -> str:
        """What it multiplies, pools and drops."""
        own = self.settings
        return f"times {own.scaling} on sums of {own.pool}, dropout {own.dropout}"

    @property
    def output(self) -> fx.Node:
        """The sum of layer and update.

        Raises:
            PreconditionError: the update is not simply added.
        """
        users = list(self.node.users)
        added = len(users) == 1 and users[0].target is _ADD and not users[0].kwargs
        if self.pooled is None or not added:
            raise PreconditionError(
                "the adapter is not simply added to its layer", where=f"node {self.node.name}"
            )
        return users[0]

    @property
    def layer_node(self) -> fx.Node:
        """What the update is added to.

        Raises:
            PreconditionError: it is not a quantized layer, or it has another reader.
        """
        first, second = self.output.args
        base = first if second is self.node else second
        quantized = isinstance(base, fx.Node) and base.target in (
            GroupLinear.target,
            ExpertLinear.target,
        )
        if not isinstance(base, fx.Node) or not quantized or len(base.users) != 1:
            raise PreconditionError(
                "the adapter is added to no quantized layer", where=f"node {self.node.name}"
            )
        return base

    @property
    def layer(self) -> GroupLinear | ExpertLinear:
        """The quantized layer; see `Adapter.layer`."""
        node, pooled = self.layer_node, self.pooled
        if pooled is None or argument(node, "x") is not pooled.x:
            raise PreconditionError(
                "the adapter pools another tensor than its layer reads", where=self.site
            )
        if node.target is not self.layer_view.target or not self._same_rows(node):
            raise PreconditionError(
                "adapter and layer assign the rows to experts differently", where=self.site
            )
        layer = self.layer_view.of(node)
        if pooled.group_size % layer.group_size:
            raise PreconditionError(
                f"the adapter pools groups of {pooled.group_size}, the weight is quantized in "
                f"groups of {layer.group_size}: it does not fold",
                where=self.site,
                hint=f"train with an adapter group_size that is a multiple of {layer.group_size}",
            )
        return layer

    def _same_rows(self, layer: fx.Node) -> bool:
        """Whether layer and adapter give the same rows to each expert."""
        return True

    @property
    def fold(self) -> Fold:
        """Offset + scaling · B A, computed in float64."""
        scaling, repeats = self.settings.scaling, self.settings.pool // self.layer.group_size

        def compute(offset: Tensor, lora_a: Tensor, lora_b: Tensor) -> dict[str, Tensor]:
            update = scaling * (lora_b.detach().double() @ lora_a.detach().double())
            delta = expand_groups(update, repeats, offset.shape[-1])
            return {"offset": (offset.double() + delta).to(offset.dtype)}

        return compute

    def remove(self, graph: fx.Graph) -> None:
        """Leave the layer in the place of the sum."""
        total, layer = self.output, self.layer_node
        move_site(total, layer)
        total.replace_all_uses_with(layer)
        erase_unread([total])


@dataclass(frozen=True)
class ExpertsAdapter(AddedAdapter):
    """`output = layer + node`, `node = expert_adapter(…)`: an adapter for each expert."""

    layer_view = ExpertLinear

    @classmethod
    def _update(
        cls,
        graph: fx.Graph,
        layer: fx.Node,
        pooled: fx.Node,
        lora: Lora,
        scaling: float,
    ) -> fx.Node:
        group_offsets = argument(layer, "group_offsets")
        return ExpertAdapter.create(graph, pooled, *lora, group_offsets, scaling)

    @property
    def operands(self) -> ExpertAdapter:
        """The operands of the node."""
        return ExpertAdapter.of(self.node)

    def _same_rows(self, layer: fx.Node) -> bool:
        return self.operands.group_offsets is argument(layer, "group_offsets")


@dataclass(frozen=True)
class IntegerZero(Adapter):
    """`output = node = integer_zero_linear(…)`: layer and adapter in one operator."""

    reads = (*_BOTH, *ADAPTER_NAMES)
    keeps_integer_zero_point = True
    kind: ClassVar[str] = INTEGER

    @classmethod
    def insert(cls, graph: fx.Graph, layer: fx.Node, lora: Lora, settings: AdapterSettings) -> None:
        """Put one operator in the place of the layer."""
        own = GroupLinear.of(layer)
        weight = own.qweight, own.scale, own.offset, own.bias, own.bits, own.group_size
        with graph.inserting_before(layer):
            adapted = IntegerZeroLinear.create(
                graph, own.x, *weight, *lora, settings.scaling, cls.kind
            )
        _replace(layer, adapted)

    @property
    def operands(self) -> IntegerZeroLinear:
        """The operands of the node."""
        return IntegerZeroLinear.of(self.node)

    @property
    def lora(self) -> Lora:
        """The nodes of A and B."""
        return self.operands.lora_A, self.operands.lora_B

    @property
    def layer(self) -> GroupLinear:
        """The layer without its adapter; the graph does not hold it."""
        own = self.operands
        parts = own.qweight, own.scale, own.offset
        return GroupLinear(own.x, *parts, own.bias, own.bits, own.group_size)

    @property
    def layer_node(self) -> fx.Node:
        """The node itself."""
        return self.node

    @property
    def output(self) -> fx.Node:
        """The node itself."""
        return self.node

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
            return dict(zip(_BOTH, made, strict=True))

        return compute

    def remove(self, graph: fx.Graph) -> None:
        """Put a quantized layer in the place of the operator."""
        with graph.inserting_before(self.node):
            plain = self.layer.insert(graph)
        _replace(self.node, plain)


@dataclass(frozen=True)
class TrainedScale(IntegerZero):
    """As `IntegerZero`, but what is trained are the scales."""

    moves = _BOTH
    kind = SCALE


def _replace(old: fx.Node, new: fx.Node) -> None:
    move_site(old, new)
    old.replace_all_uses_with(new)
    erase_unread([old])


_KINDS: Mapping[object, type[Adapter]] = {
    PooledAdapter.target: AddedAdapter,
    ExpertAdapter.target: ExpertsAdapter,
    INTEGER: IntegerZero,
    SCALE: TrainedScale,
}
"""By the operator, or by the kind that an integer_zero_linear names."""


def adapter_at(node: fx.Node) -> Adapter | None:
    """The adapter whose A and B a node reads, or None where it is no adapter's."""
    key: object = node.target
    if node.target is IntegerZeroLinear.target:
        key = argument(node, "kind")
        if key not in _KINDS:
            raise InternalError(f"there is no adapter of kind {key}", where=f"node {node.name}")
    kind = _KINDS.get(key)
    return None if kind is None else kind(node)


def find_adapters(graph: fx.Graph) -> list[Adapter]:
    """Every use of an adapter, in graph order."""
    return [found for node in graph.nodes if (found := adapter_at(node)) is not None]


def adapter_kind(layer: fx.Node, kind: str | None) -> type[Adapter]:
    """The class of a new adapter of a quantized layer.

    Args:
        layer: The node.
        kind: `"integer"` or `"scale"`, which keep zero-points integers; None for another.
    """
    if kind is not None:
        return _KINDS[kind]
    return ExpertsAdapter if layer.target is ExpertLinear.target else AddedAdapter
