"""dequantize-groups: back to float weights, with the same function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.errors import PostconditionError, UnsupportedError
from qalora_compile.ir.affine import dequantize
from qalora_compile.ir.lazy_tensor import defer
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.embedding import GroupEmbedding
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import (
    EXPERT_LINEAR,
    GROUP_EMBEDDING,
    GROUP_LINEAR,
    ON_CODES,
    LayerOnCodes,
    layer_on_codes,
    stored_parts,
)
from qalora_compile.ir.stages import FLOAT, FOLDED, QUANTIZED
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.rewrite import TensorNodes
from qalora_compile.progress import track

_ATEN = torch.ops.aten
NAME = "dequantized"
"""Name of the float weight, below the path of its site."""


@dataclass(frozen=True, kw_only=True)
class DequantizeGroups(Pass):
    """Replace packed codes by the weights that they encode.

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 4, 32)
    After:   %1 = aten.linear(%x, @fc.dequantized, @fc.bias)

    For runtimes without quantized kernels, and to measure what quantization saves.

    Fires on: every group_linear, and every group_embedding, which becomes aten.embedding. A weight
    that is used twice, or both looked up and multiplied by, is dequantized once.
    Leaves alone: nothing; stacked experts are refused.
    Exactness: the same weights, `scale · q + offset`, rounded to float32 as in the operator.
    """

    name: ClassVar[str] = "dequantize-groups"
    consumes: ClassVar[tuple[str, ...]] = (QUANTIZED, FOLDED)
    produces: ClassVar[str | None] = FLOAT

    def requires(self, program: Program) -> None:
        """Refuse stacked experts.

        Raises:
            UnsupportedError: there are some.
        """
        for node in program.graph.nodes:
            if node.target is EXPERT_LINEAR:
                raise UnsupportedError("stacked experts are not dequantized", where=site_of(node))

    def call(self, program: Program) -> PassResult:
        """Dequantize."""
        graph, tensors = program.copy_graph(), program.tensors()
        rows = {site.name: site for site in program.plan}
        layers = [node for node in graph.nodes if node.target in (GROUP_LINEAR, GROUP_EMBEDDING)]
        nodes, changes = TensorNodes(graph), []
        for node in track(layers, "dequantize"):
            site = rows[site_of(node) or ""]
            layer, k = layer_on_codes(node), site.k
            bits, group_size = layer.bits, layer.group_size

            def compute(
                qweight: Tensor,
                scale: Tensor,
                offset: Tensor,
                *,
                bits: int = bits,
                group_size: int = group_size,
                k: int = k,
            ) -> dict[str, Tensor]:
                weight = dequantize(qweight, scale, offset, bits=bits, group_size=group_size, k=k)
                return {NAME: weight.contiguous()}

            name = f"{site.path}.{NAME}"
            if name not in tensors:
                tensors[name] = defer(compute, *stored_parts(program, node, layer))[NAME]
                changes.append(Change(site.path, f"{bits} bits to float"))
            weight = nodes.get(name)
            with graph.inserting_before(node):
                new = _float_layer(graph, layer, weight)
            move_site(node, new)
            node.replace_all_uses_with(new)
            erase_unread([node])
        done = {"bits": None, "group_size": None, "frozen_integer_zero": False}
        plan = program.plan.update(dict.fromkeys(rows, done))
        return PassResult(program.evolve(graph=graph, tensors=tensors, plan=plan), tuple(changes))

    def ensures(self, before: Program, after: Program) -> None:
        """No quantized operator is left."""
        for node in after.graph.nodes:
            if node.target in ON_CODES or node.target is GROUP_EMBEDDING:
                raise PostconditionError("a layer was not dequantized", where=site_of(node))


def _float_layer(graph: fx.Graph, layer: LayerOnCodes, weight: fx.Node) -> fx.Node:
    """Insert the operator on a float weight; a looked-up row is cast where it was before."""
    if not isinstance(layer, GroupEmbedding):
        assert isinstance(layer, GroupLinear), "experts are refused"
        return graph.call_function(_ATEN.linear.default, (layer.x, weight, layer.bias))
    found = graph.call_function(_ATEN.embedding.default, (weight, layer.ids))
    if layer.dtype is torch.float32:
        return found
    return graph.call_function(_ATEN.to.dtype, (found, layer.dtype))
