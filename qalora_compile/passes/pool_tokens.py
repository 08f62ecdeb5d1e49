"""pool-tokens: add an output with one vector per text, pooled from those of its tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.config import one_of
from qalora_compile.config.choices import CLS, MEAN, TOKEN_POOLINGS
from qalora_compile.errors import PostconditionError, UserInputError
from qalora_compile.ir.ops.views import output_value
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ADAPTED, ANNOTATED, FLOAT, FOLDED, QUANTIZED
from qalora_compile.ir.torch_internals import pytree, set_output_tree
from qalora_compile.passes.framework.base import Change, Pass, PassResult

HIDDEN, MASK, EMBEDDING = "last_hidden_state", "attention_mask", "sentence_embedding"
_ATEN = torch.ops.aten
_LEAST_COUNT, _LEAST_NORM = 1e-9, 1e-12
"""Constants of sentence-transformers, for texts without tokens and vectors of length 0."""


@dataclass(frozen=True, kw_only=True)
class PoolTokens(Pass):
    """Give an encoder the additional output `sentence_embedding`, `[batch, width]`.

    Before:  return (%hidden)
    After:   %m = aten.to.dtype(aten.unsqueeze(%attention_mask, -1), f32)
             %s = aten.div(aten.sum(%hidden · %m, 1), aten.clamp(aten.sum(%m, 1), 1e-09))
             return (%hidden, %s)

    Options:
        pooling: `mean` of the tokens that are not padding, or `cls`, the first token.
        normalize: Divide by the Euclidean norm.

    Fires on: a program with the output `last_hidden_state` and, for the mean, the input
    `attention_mask`.
    Leaves alone: other programs, and those that have the output; a skip says why.
    Exactness: existing outputs do not change.
    """

    name: ClassVar[str] = "pool-tokens"
    consumes: ClassVar[tuple[str, ...]] = (FLOAT, ANNOTATED, QUANTIZED, ADAPTED, FOLDED)
    produces: ClassVar[str | None] = None

    pooling: str = MEAN
    normalize: bool = False

    def __post_init__(self) -> None:
        one_of("pooling", self.pooling, TOKEN_POOLINGS)
        if not isinstance(self.normalize, bool):
            raise UserInputError(f"normalize is {self.normalize!r}", hint="use true or false")

    def call(self, program: Program) -> PassResult:
        """Add the output."""
        reason = self._missing(program)
        graph = program.copy_graph()
        if reason:
            skip = Change(EMBEDDING, "no output is added", reason)
            return PassResult(program.evolve(graph=graph), skips=(skip,))
        output = graph.output_node()
        leaves = pytree.tree_leaves(output_value(graph), is_leaf=lambda leaf: leaf is None)
        named = dict(zip(program.signature.outputs, leaves, strict=True))
        with graph.inserting_before(output):
            pooled = self._pooled(graph, program, named[HIDDEN])
        names = (*named, EMBEDDING)
        output.args = ((*leaves, pooled),)
        tree = pytree.tree_structure(dict.fromkeys(names, 0))
        set_output_tree(graph, tree)
        after = program.evolve(graph=graph)
        signature = dataclasses.replace(program.signature, outputs=names)
        after = dataclasses.replace(after, signature=signature)
        what = f"{self.pooling} of {HIDDEN}{', normalized' if self.normalize else ''}"
        return PassResult(after, (Change(EMBEDDING, what),))

    def _missing(self, program: Program) -> str:
        """Why the program's outputs cannot be pooled; empty if they can."""
        outputs = program.signature.outputs
        if EMBEDDING in outputs:
            return f"the program has the output {EMBEDDING} already"
        if HIDDEN not in outputs:
            return f"the outputs are {', '.join(outputs)}, and not {HIDDEN}"
        known = {leaf.name for leaf in program.signature.inputs if leaf.dtype is not None}
        if self.pooling == MEAN and MASK not in known:
            return f"there is no input {MASK} that says which tokens are padding"
        return ""

    def _pooled(self, graph: fx.Graph, program: Program, hidden: fx.Node) -> fx.Node:
        """`[B, T, H]` to `[B, H]`."""
        call = graph.call_function
        if self.pooling == CLS:
            pooled = call(_ATEN.select.int, (hidden, 1, 0))
        else:
            mask = _placeholder(graph, program, MASK)
            wide = call(_ATEN.unsqueeze.default, (mask, -1))
            wide = call(_ATEN.to.dtype, (wide, _dtype(hidden)))
            total = call(_ATEN.sum.dim_IntList, (call(_ATEN.mul.Tensor, (hidden, wide)), [1]))
            count = call(_ATEN.sum.dim_IntList, (wide, [1]))
            count = call(_ATEN.clamp.default, (count, _LEAST_COUNT))
            pooled = call(_ATEN.div.Tensor, (total, count))
        if not self.normalize:
            return pooled
        squares = call(_ATEN.mul.Tensor, (pooled, pooled))
        norm = call(_ATEN.sqrt.default, (call(_ATEN.sum.dim_IntList, (squares, [-1], True)),))
        norm = call(_ATEN.clamp.default, (norm, _LEAST_NORM))
        return call(_ATEN.div.Tensor, (pooled, norm))

    def ensures(self, before: Program, after: Program) -> None:
        """The former outputs come first, in their order."""
        known = before.signature.outputs
        if after.signature.outputs[: len(known)] != known:
            raise PostconditionError("an output was lost")


def _placeholder(graph: fx.Graph, program: Program, name: str) -> fx.Node:
    places: list[fx.Node] = [node for node in graph.nodes if node.op == "placeholder"]
    names = [leaf.name for leaf in program.signature.inputs]
    return places[names.index(name)]


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else torch.float32
