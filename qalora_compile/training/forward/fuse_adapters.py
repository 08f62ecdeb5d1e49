"""Faster forms of a program's graph for training: the same function, on the same tensors."""

from __future__ import annotations

import operator

from torch import fx

from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import ADAPTED_LINEAR, GROUP_LINEAR, POOLED_ADAPTER
from qalora_compile.passes.fold_adapters import match_adapter

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
    for update in [node for node in graph.nodes if node.target is POOLED_ADAPTER]:
        if not _is_plain(update):
            continue
        adapter = match_adapter(update)
        site = site_of(adapter.total)
        if site is None or program.plan[site].dtype not in _WIDE:
            continue
        x, *weight, bias, bits, group_size = adapter.base.args
        _, lora_a, lora_b, scaling = update.args
        operands = (x, *weight, bias, lora_a, lora_b, bits, group_size)
        with graph.inserting_before(adapter.total):
            both = graph.call_function(ADAPTED_LINEAR, (*operands, adapter.pooled.args[1], scaling))
            y = graph.call_function(operator.getitem, (both, 0))
        move_site(adapter.total, y)
        adapter.total.replace_all_uses_with(y)
        erase_unread([adapter.total])
    return graph


def _is_plain(update: fx.Node) -> bool:
    """Whether an adapter is of the form that folds, and can be fused."""
    pooled, (total, *others) = update.args[0], list(update.users)
    assert isinstance(pooled, fx.Node)
    base = total.args[0]
    return (
        not others
        and isinstance(base, fx.Node)
        and base.target is GROUP_LINEAR
        and pooled.args[:1] == base.args[:1]
    )
