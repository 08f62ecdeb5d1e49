"""Faster forms of a program's graph for training: the same function, on the same tensors."""

from __future__ import annotations

import operator

import torch
from torch import fx

from qalora_compile.ir.adapters.added import AddedAdapter
from qalora_compile.ir.adapters.base import Adapter
from qalora_compile.ir.adapters.find import find_adapters
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.adapted_linear import AdaptedLinear
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.program import Program

_WIDE = ("float32", "float64")


def fuse_adapters(program: Program) -> fx.Graph:
    """The graph with each layer and its adapter in one `qalora::adapted_linear`.

    Before:  %1 = qalora.group_linear(%x, …)
             %2 = qalora.group_sum(%x, 32)
             %3 = qalora.pooled_adapter(%2, @fc.lora_A, @fc.lora_B, scaling · f)
             %4 = aten.add.Tensor(%1, %3)
    After:   %4 = qalora.adapted_linear(%x, …, @fc.lora_A, @fc.lora_B, 4, 32, 32, scaling · f)[0]

    Left as they are: adapters of experts, those between whose pooling and product something stands
    (dropout, for instance), and layers that compute in half precision, where the sum of weight and
    update would be rounded to half before it is multiplied.

    Args:
        program: At stage `adapted`; it is not changed.
    """
    graph = program.copy_graph()
    for adapter in find_adapters(graph):
        if not _is_plain(adapter):
            continue
        layer, own, total = adapter.layer, adapter.settings, adapter.output
        site = site_of(total)
        if site is None or program.plan[site].dtype not in _WIDE:
            continue
        assert isinstance(layer, GroupLinear), "it is plain"
        weight = layer.qweight, layer.scale, layer.offset, layer.bias
        (lora_a, lora_b), groups = adapter.trained, (layer.bits, layer.group_size, own.pool)
        with graph.inserting_before(total):
            both = AdaptedLinear.create(
                graph, layer.x, *weight, lora_a, lora_b, *groups, own.scaling
            )
            y = graph.call_function(operator.getitem, (both, 0))
        move_site(total, y)
        total.replace_all_uses_with(y)
        erase_unread([total])
    return graph


def _is_plain(adapter: Adapter) -> bool:
    """Whether an adapter is of the form that folds, and can be fused."""
    if type(adapter) is not AddedAdapter or adapter.dropped or adapter.pooled is None:
        return False
    total, *others = adapter.node.users
    if others or total.target is not torch.ops.aten.add.Tensor:
        return False
    base = argument(total, "self")
    return base.target is GroupLinear.target and argument(base, "x") is adapter.pooled.x
