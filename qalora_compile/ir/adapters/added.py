"""Adapters that add their update to the output of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.errors import InternalError, PreconditionError
from qalora_compile.ir.adapters.base import DROPOUT, Adapter, AdapterSettings, Fold, Nodes
from qalora_compile.ir.affine import expand_groups
from qalora_compile.ir.meta import move_site
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.experts import ExpertAdapter, ExpertLinear
from qalora_compile.ir.ops.linear import GroupLinear, GroupSum, PooledAdapter
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.stages import ADAPTER_NAMES

_ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class AddedAdapter(Adapter):
    """`output = layer + node`, `node = pooled_adapter(dropout(group_sum(x)), A, B, scaling)`.

    The dropout may be absent.
    """

    reads = ("offset", *ADAPTER_NAMES)
    layer_view: ClassVar[type[GroupLinear] | type[ExpertLinear]] = GroupLinear

    @classmethod
    def insert(cls, graph: fx.Graph, layer: fx.Node, own: Nodes, settings: AdapterSettings) -> None:
        """Add an update to the layer."""
        with graph.inserting_after(layer):
            total = graph.call_function(_ADD, (layer, layer))
        layer.replace_all_uses_with(total)
        with graph.inserting_before(total):
            pooled = GroupSum.create(graph, argument(layer, "x"), settings.pool)
            if settings.dropout:
                pooled = graph.call_function(DROPOUT, (pooled, settings.dropout, False))
            update = cls._update(graph, layer, pooled, own, settings.scaling)
        total.args = (layer, update)
        move_site(layer, total)

    @classmethod
    def _update(
        cls,
        graph: fx.Graph,
        layer: fx.Node,
        pooled: fx.Node,
        own: Nodes,
        scaling: float,
    ) -> fx.Node:
        lora_a, lora_b = own
        return PooledAdapter.create(graph, pooled, lora_a, lora_b, scaling)

    @property
    def operands(self) -> PooledAdapter | ExpertAdapter:
        """The operands of the node."""
        return PooledAdapter.of(self.node)

    @property
    def trained(self) -> Nodes:
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
        own: Nodes,
        scaling: float,
    ) -> fx.Node:
        group_offsets = argument(layer, "group_offsets")
        lora_a, lora_b = own
        return ExpertAdapter.create(graph, pooled, lora_a, lora_b, group_offsets, scaling)

    @property
    def operands(self) -> ExpertAdapter:
        """The operands of the node."""
        return ExpertAdapter.of(self.node)

    def _same_rows(self, layer: fx.Node) -> bool:
        return self.operands.group_offsets is argument(layer, "group_offsets")
