"""Cross-entropy of a language model that never holds the logits of all tokens.

With a vocabulary of 49 thousand, the logits of a thousand tokens take 200 MB, and the usual
computation of the loss holds three or four tensors of that size. Here the head is split off. It
runs on a few rows at a time, only on those that carry loss. The loss is a sum over rows, so the
gradient of each chunk is computed at once, and the chunk is freed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.module import (
    ProgramModule,
    build_module,
    copy_graph,
    erase_unread,
    program_tensors,
)
from qalora_compile.ir.ops.views import argument, output_value
from qalora_compile.ir.signature import output_spec
from qalora_compile.ir.spec import (
    ADAPTED_LINEAR,
    GROUP_LINEAR,
    GROUP_SUM,
    INTEGER_ZERO_LINEAR,
    POOLED_ADAPTER,
)
from qalora_compile.ir.subgraph import extract_subgraph
from qalora_compile.ir.torch_internals import pytree, set_output_tree

_ATEN = torch.ops.aten
_PRODUCTS = frozenset(
    {_ATEN.linear.default, GROUP_LINEAR, ADAPTED_LINEAR, INTEGER_ZERO_LINEAR, POOLED_ADAPTER}
)
_ROW_WISE = _PRODUCTS | frozenset(
    {
        GROUP_SUM,
        _ATEN.add.Tensor,
        _ATEN.mul.Tensor,
        _ATEN.div.Tensor,
        _ATEN.tanh.default,
        _ATEN.to.dtype,
    }
)
_CHUNK_ELEMENTS = 1 << 23
"""A chunk has about this many logits, which are 32 MB in float32."""


@dataclass(frozen=True)
class Head:
    """Maps hidden states `[n, H]` to logits `[n, V]`; without a module, it is the identity.

    Attributes:
        module: The subgraph, which computes on rows.
        parameters: Its trainable tensors: those of an adapter, if the head has one.
    """

    module: ProgramModule | None
    parameters: tuple[Tensor, ...] = ()

    def __call__(self, rows: Tensor) -> Tensor:
        """Compute logits, in float32 or wider."""
        logits: Tensor = rows if self.module is None else self.module(rows)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def split_head(module: ProgramModule) -> tuple[ProgramModule, Head]:
    """Split a language model's graph into one that gives hidden states `[B, T, H]`, and its head.

    The head computes the logits of each token from a single vector of that token. If there is no
    such head, the first graph gives the logits.
    """
    (end,) = (node for node in module.graph.nodes if node.op == "output")
    outputs = list(output_value(module.graph))
    logits = outputs[_place_of_logits(module.graph, len(outputs))]
    found = _row_wise_part(logits)
    nodes, cut = found or ((), logits)
    graph = copy_graph(module.graph)
    named = {node.name: node for node in graph.nodes}
    set_output_tree(graph, pytree.tree_structure(0))
    graph.erase_node(named[end.name])
    graph.output((named[cut.name],))
    erase_unread([named[node.name] for node in outputs if isinstance(node, fx.Node)])
    tensors = program_tensors(module)
    body = build_module(graph, tensors, submodules=module, training=module.training)
    if found is None:
        return body, Head(None)
    head = extract_subgraph(module, nodes, (cut,), logits)
    return body, Head(head, tuple(p for p in head.parameters() if p.requires_grad))


def _place_of_logits(graph: fx.Graph, count: int) -> int:
    """The index of the logits, as `logits_of` finds them, among the flat outputs.

    Raises:
        UnsupportedError: there are none.
    """
    tree = pytree.tree_unflatten(range(count), output_spec(graph))
    if isinstance(tree, dict):
        tree = tree.get("logits")
    elif isinstance(tree, (tuple, list)) and tree:
        tree = tree[0]
    if not isinstance(tree, int):
        raise UnsupportedError("the model gives no logits, so it is not a language model")
    return tree


def _row_wise_part(logits: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node] | None:
    """The last nodes of a graph, from a linear map on, if they compute row by row.

    Returns them in graph order, and the node that they read.
    """
    order = {node: place for place, node in enumerate(logits.graph.nodes)}
    taken: list[fx.Node] = []
    reached = {logits}
    while len(reached) > 1 or not any(node.target in _PRODUCTS for node in taken):
        node = max(reached, key=order.__getitem__)
        item = node.target is operator.getitem
        of_fused = item and argument(node, "a").target is ADAPTED_LINEAR
        if node.target not in _ROW_WISE and not of_fused:
            return None
        taken.append(node)
        reached.remove(node)
        reached.update(n for n in node.all_input_nodes if n.op != "get_attr")
    return tuple(reversed(taken)), reached.pop()


class RowLoss(Protocol):
    """A loss that is a sum over rows of logits."""

    def __call__(self, logits: Tensor, rows: slice, *, slope: bool) -> tuple[Tensor, Tensor | None]:
        """The loss of some rows.

        Args:
            logits: `[c, V]`, in float32 or wider, without gradients.
            rows: Which of all rows they are.
            slope: Whether the gradient is needed.

        Returns:
            The sum over the rows in nats, a scalar, and its gradient by the logits, `[c, V]`.
        """


@dataclass(frozen=True)
class _CrossEntropy:
    targets: Tensor

    def __call__(self, logits: Tensor, rows: slice, *, slope: bool) -> tuple[Tensor, Tensor | None]:
        target = self.targets[rows]
        peak = torch.logsumexp(logits, -1, keepdim=True)
        right = logits.gather(-1, target[:, None])
        total = (peak - right).sum()
        if not slope:
            return total, None
        found = (logits - peak).exp_()
        return total, found.scatter_add_(
            -1, target[:, None], found.new_full((len(target), 1), -1.0)
        )


def mean_loss(rows: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Mean cross-entropy in nats of hidden states `[n, H]` against targets `[n]`; a scalar."""
    if head.module is None:
        return functional.cross_entropy(head(rows), targets)
    return summed_loss(rows, _CrossEntropy(targets), head) / len(targets)


def summed_loss(rows: Tensor, loss: RowLoss, head: Head) -> Tensor:
    """The loss of hidden states `[n, H]`, summed over the rows; a scalar in nats."""
    if not torch.is_grad_enabled():
        return _sum(rows, loss, head, ())[0]
    total: Tensor = _ChunkedLoss.apply(rows, loss, head, *head.parameters)  # type: ignore[no-untyped-call]
    return total


def token_log_probs(rows: Tensor, targets: Tensor, head: Head) -> Tensor:
    """The log-probability, in nats, of each target `[n]` after hidden states `[n, H]`; `[n]`.

    The logits of a chunk are computed again in the backward pass, since the gradient of a chunk
    depends on the sums over complete texts.
    """
    if head.module is None:
        return _log_probs(head, rows, targets)
    with torch.no_grad():
        width = head(rows[:1]).shape[-1]
    size = max(1, _CHUNK_ELEMENTS // width)
    parts = zip(rows.split(size), targets.split(size), strict=True)
    found: list[Tensor] = [
        checkpoint(_log_probs, head, part, target, use_reentrant=False) for part, target in parts
    ]
    return torch.cat(found)


def _log_probs(head: Head, rows: Tensor, targets: Tensor) -> Tensor:
    return -functional.cross_entropy(head(rows), targets, reduction="none")


class _ChunkedLoss(torch.autograd.Function):
    """The sum over rows; its forward pass also computes the gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: RowLoss, head: Head, *parameters: Tensor) -> Tensor:
        wanted = tuple(
            p for p, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True) if needed
        )
        total, grads = _sum(rows, loss, head, (*wanted,), rows_too=True)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *others = (g * grad.to(g.dtype) for g in ctx.saved_tensors)
        found = iter(others)
        rest = (next(found) if needed else None for needed in ctx.needs_input_grad[3:])
        return (rows, None, None, *rest)


def _sum(
    rows: Tensor, loss: RowLoss, head: Head, wanted: Sequence[Tensor], *, rows_too: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The summed loss and its gradients with respect to the rows and `wanted`, chunk by chunk."""
    total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    grads = [torch.zeros_like(p) for p in wanted]
    row_grads = [rows[:0]]
    start, count = 0, 1  # the first chunk is one row, which shows the width of logits
    while start < len(rows):
        chosen = slice(start, start + count)
        part = rows[chosen].detach()
        with torch.set_grad_enabled(rows_too):
            logits = head(part.requires_grad_(rows_too))
        value, slope = loss(logits.detach(), chosen, slope=rows_too)
        total += value
        if slope is not None:
            row_grad, *others = torch.autograd.grad(logits, (part, *wanted), slope)
            row_grads.append(row_grad)
            for total_grad, grad in zip(grads, others, strict=True):
                total_grad.add_(grad)
        start += count
        count = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    return total, ([torch.cat(row_grads), *grads] if rows_too else [])
