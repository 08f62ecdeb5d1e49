"""canonicalize-pointwise: rewrite 1×1 convolutions as linear maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qalora_compile.errors import PostconditionError
from qalora_compile.ir.meta import module_path
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.pattern import get_tensor
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import FLOAT
from qalora_compile.passes.analysis.find_weight_uses import KIND, POINTWISE, conv_options
from qalora_compile.passes.framework.base import Change, Pass, PassResult

_ATEN = torch.ops.aten
_CONVOLUTIONS = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default)


@dataclass(frozen=True, kw_only=True)
class CanonicalizePointwise(Pass):
    """Rewrite convolutions with a kernel of 1 as linear maps along the channels.

    Before:  %1 = aten.conv2d(%x, @conv.weight, @conv.bias)
    After:   %1 = aten.movedim(%x, -3, -1)
             %2 = aten.view(@conv.weight, [N, K])
             %3 = aten.linear(%1, %2, @conv.bias)
             %4 = aten.movedim(%3, -1, -3)

    Fires on: conv1d, conv2d and conv3d by a parameter whose kernel, stride and groups are 1 and
    whose padding is 0.
    Leaves alone: every other convolution; annotate-linears says why.
    Exactness: exact in real arithmetic; sums run in another order.
    """

    name: ClassVar[str] = "canonicalize-pointwise"
    consumes: ClassVar[tuple[str, ...]] = (FLOAT,)
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Rewrite."""
        if not any(_is_pointwise(node, program) for node in program.graph.nodes):
            return PassResult(program.evolve())
        graph = program.copy_graph()
        changes = []
        for node in list(graph.nodes):
            if _is_pointwise(node, program):
                changes.append(Change(module_path(node) or node.name, "1×1 convolution to linear"))
                _rewrite(graph, node, program)
        return PassResult(program.evolve(graph=graph), tuple(changes))

    def ensures(self, before: Program, after: Program) -> None:
        """No such convolution is left."""
        for node in after.graph.nodes:
            if _is_pointwise(node, after):
                raise PostconditionError("a 1×1 convolution is left", where=f"node {node.name}")


def _is_pointwise(node: fx.Node, program: Program) -> bool:
    if node.target not in _CONVOLUTIONS:
        return False
    weight = argument(node, "weight")
    if weight.op != "get_attr":
        return False
    tensor = get_tensor(program.module, str(weight.target))
    if tensor is None or set(tensor.shape[2:]) != {1}:
        return False
    return all(
        value == plain or (isinstance(value, (list, tuple)) and set(value) == {plain})
        for _, value, plain in conv_options(node)
    )


def _rewrite(graph: fx.Graph, node: fx.Node, program: Program) -> None:
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    tensor = get_tensor(program.module, str(weight.target))
    assert tensor is not None, "checked by the match"
    channels = 1 - tensor.dim()  # counted from the end: there may be no batch axis
    with graph.inserting_before(node):
        last = graph.call_function(_ATEN.movedim.int, (x, channels, -1))
        matrix = graph.call_function(_ATEN.view.default, (weight, list(tensor.shape[:2])))
        y = graph.call_function(_ATEN.linear.default, (last, matrix, bias))
        result = graph.call_function(_ATEN.movedim.int, (y, -1, channels))
    for new in (last, y, result):
        for key in ("nn_module_stack", "stack_trace"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
    y.meta[KIND] = POINTWISE
    node.replace_all_uses_with(result)
    graph.erase_node(node)
