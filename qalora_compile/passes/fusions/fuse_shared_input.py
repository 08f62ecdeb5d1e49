"""fuse-shared-input: layers that read one value run as one operator."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.errors import PostconditionError
from qalora_compile.ir.joined_layers import CODES, SPLIT
from qalora_compile.ir.lazy_tensor import defer
from qalora_compile.ir.meta import move_site
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.linear import PadGroups
from qalora_compile.ir.ops.target_kernels import GroupQuantLinear
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import PAD_GROUPS, stored_tensor
from qalora_compile.ir.stages import LEGALIZED
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.rewrite import TensorNodes, item

_PARTS = ("qweight", "scale", "zero_point")
_JOINED = "joined"
_Layer = tuple[fx.Node, GroupQuantLinear]


@dataclass(frozen=True, kw_only=True)
class FuseSharedInput(Pass):
    """Join the layers of one input (q, k, v; gate, up) into one, and split its result.

    Before:  %1 = qalora.group_quant_linear(%x, @q.qweight, @q.scale, @q.zero_point, 4, 32, fp32)
             %2 = qalora.group_quant_linear(%x, @k.qweight, @k.scale, @k.zero_point, 4, 32, fp32)
    After:   %3 = qalora.group_quant_linear(%x, @q.joined.qweight, …, 4, 32, fp32)
             %4 = aten.split_with_sizes(%3, [64, 32], -1)
             %1, %2 = its results

    The rows of the weights follow each other in graph order. Activations are then read, and rounded
    where `compute` says so, once for all of them. Biases are added behind, as before.

    Fires on: every two or more group_quant_linear of one value, or of one value padded alike, with
    the same bits, group size, compute and dtype of parameters.
    Leaves alone: layers of such a value that differ in one of these, with a reason, and layers
    whose weight has another reader, which would then be stored twice.
    Exactness: exact, the same sums of the same products.
    """

    name: ClassVar[str] = "fuse-shared-input"
    consumes: ClassVar[tuple[str, ...]] = (f"{LEGALIZED}ort",)
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Join."""
        graph, tensors = program.copy_graph(), program.tensors()
        nodes, changes, skips = TensorNodes(graph), list[Change](), list[Change]()
        for alike in _by_input(program, graph).values():
            for layers in alike.values():
                if len(layers) > 1:
                    tensors |= _join(program, nodes, layers)
                    changes.append(_said(layers))
                elif len(alike) > 1:
                    why = "the other layers of its input differ in bits, groups or dtype"
                    skips.append(Change(layers[0][0].name, "left as it is", why))
        after = program.evolve(graph=graph, tensors=tensors)
        return PassResult(after, tuple(changes), tuple(skips))

    def ensures(self, before: Program, after: Program) -> None:
        """No two layers that could be joined are left."""
        for alike in _by_input(after, after.graph).values():
            for layers in alike.values():
                if len(layers) > 1:
                    raise PostconditionError("a layer was not joined", where=layers[1][0].name)


def _by_input(
    program: Program, graph: fx.Graph
) -> dict[object, dict[tuple[object, ...], list[_Layer]]]:
    """The layers by what they read, and those by what has to be equal."""
    found: dict[object, dict[tuple[object, ...], list[_Layer]]] = defaultdict(dict)
    readers = Counter[object]()
    for node in graph.nodes:
        if node.op == "get_attr":
            readers[node.target] += len(node.users)
    for node, layer in GroupQuantLinear.all_in(graph):
        if readers[layer.codes.target] > 1:
            continue
        source: object = layer.x
        if layer.x.target is PAD_GROUPS:
            pad = PadGroups.of(layer.x)
            source = pad.x, pad.group_size, pad.width
        dtype = stored_tensor(program, node, layer.scale).dtype
        kind = layer.bits, layer.group_size, layer.compute, dtype
        found[source].setdefault(kind, []).append((node, layer))
    return found


def _join(program: Program, nodes: TensorNodes, layers: Sequence[_Layer]) -> dict[str, Tensor]:
    """Put one layer in the place of several; returns its tensors."""
    first, own = layers[0]
    graph, path = first.graph, f"{str(own.codes.target).removesuffix(CODES)}.{_JOINED}"
    operands = [(node, (one.codes, one.scale, one.zero_point)) for node, one in layers]
    stored = [[stored_tensor(program, node, part) for part in parts] for node, parts in operands]
    tensors: dict[str, Tensor] = {}
    for name, parts in zip(_PARTS, zip(*stored, strict=True), strict=True):
        tensors |= defer(partial(_concatenate, f"{path}.{name}"), *parts)
    sizes = [codes.shape[0] for codes, *_ in stored]
    codes, scale, zero_point = (nodes.get(f"{path}.{name}") for name in _PARTS)
    with graph.inserting_before(first):
        joined = replace(own, codes=codes, scale=scale, zero_point=zero_point)
        split = graph.call_function(SPLIT, (joined.insert(graph), sizes, -1))
        results = [item(split, index) for index in range(len(layers))]
    for (node, layer), result in zip(layers, results, strict=True):
        move_site(node, result)
        node.replace_all_uses_with(result)
        erase_unread([node])
        erase_unread([layer.x])
    return tensors


def _concatenate(name: str, *rows: Tensor) -> dict[str, Tensor]:
    return {name: torch.cat(rows)}


def _said(layers: Sequence[_Layer]) -> Change:
    paths = [str(layer.codes.target).removesuffix(CODES) for _, layer in layers]
    return Change(paths[0], f"joined with {', '.join(paths[1:])}", "one input, the same format")
