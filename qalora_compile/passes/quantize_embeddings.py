"""quantize-embeddings: quantize embeddings and heads, stored once where they are tied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.config import one_of
from qalora_compile.config.choices import EMBEDDING_BITS
from qalora_compile.errors import PostconditionError, UserInputError
from qalora_compile.ir.affine import has_integer_zero_points
from qalora_compile.ir.lazy_tensor import defer, holds
from qalora_compile.ir.meta import mark_site, move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.embedding import GroupEmbedding
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.pattern import match_linear
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import EMBEDDING, EXCLUDED, QUANTIZE, UNUSED, Site
from qalora_compile.ir.spec import GROUP_EMBEDDING, GROUP_LINEAR, layer_on_codes, stored_parts
from qalora_compile.ir.stages import ADAPTED, CODE_NAMES, FOLDED, QUANTIZED
from qalora_compile.ir.tensor_identity import storage_key
from qalora_compile.passes.analysis.find_weight_uses import Use, find_heads, find_uses, owner_path
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.rewrite import TensorNodes
from qalora_compile.progress import track
from qalora_compile.quantizers.minmax import quantize_integer_zero

KEPT = "embedding or head kept in float"
_GROUP_UNIT = 16  # all kernels take multiples of it without padding
_SMALL_ELEMENTS = 4096
_LOOKUP = torch.ops.aten.embedding.default
_REASONS = {
    EMBEDDING: "table of an embedding: its rows are looked up in codes; no adapter",
    "": "head: no adapter",
}

Member = tuple[Use, Site]
"""A use of a float weight, and its row in the plan."""


@dataclass(frozen=True, kw_only=True)
class QuantizeEmbeddings(Pass):
    """Quantize the tables of embeddings, and heads that are still in float.

    Before:  %1 = aten.embedding(@embed.weight, %ids)
             %9 = aten.linear(%8, @embed.weight)
    After:   %1 = qalora.group_embedding(%ids, @embed.qweight, …, f32, 8, 32, 64)
             %9 = qalora.group_linear(%8, @embed.qweight, …, None, 8, 32)

    Zero-points are integers, so no kernel needs a correction; they stay so, as insert-adapters
    leaves these rows alone.

    Fires on: tables that only lookups and a head with the same rows read (a tie, where one set of
    tensors serves both), and heads with a weight of their own.
    Leaves alone, with a reason: tables of at most 4096 weights, tables with other readers, heads
    that were excluded, and tables tied to these. A head that quantize-groups has quantized stays
    so, and a table tied to it gets codes of its own.
    Exactness: lossy, as quantize-groups.

    Options:
        bits: 8 or 4.
        group_size: Weights of a row that share a scale; a multiple of 16.
    """

    name: ClassVar[str] = "quantize-embeddings"
    consumes: ClassVar[tuple[str, ...]] = (QUANTIZED, ADAPTED, FOLDED)
    produces: ClassVar[str | None] = None
    lossy: ClassVar[bool] = True

    bits: int = 8
    group_size: int = 32

    def __post_init__(self) -> None:
        one_of("bits of embeddings", self.bits, EMBEDDING_BITS)
        size = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % _GROUP_UNIT:
            raise UserInputError(
                f"group_size of embeddings is {size!r}", hint=f"use a multiple of {_GROUP_UNIT}"
            )

    def call(self, program: Program) -> PassResult:
        """Quantize and rewrite."""
        graph, tensors = program.copy_graph(), program.tensors()
        chosen, kept = _choose(graph, program)
        nodes, rows, changes = TensorNodes(graph), dict[str, dict[str, object]](), []
        for members in track(chosen, "quantize embeddings"):
            use, first = members[0]
            path = _free_path(owner_path(use.weight), tensors)
            shape = use.matrix.shape if use.matrix is not None else use.tensor.shape
            n, k = int(shape[0]), int(shape[1])
            tensors |= self._quantize(path, use)
            for member, site in members:
                new = self._rewrite(graph, member.node, path, site, nodes, k)
                mark_site(new, site.name)
                rows[site.name] = self._row(site, path, n, k)
            users = ", ".join(site.name for _, site in members[1:])
            what = f"{k}×{n} to {self.bits} bits" + (f", also for {users}" if users else "")
            changes.append(Change(first.name, what, str(rows[first.name]["reason"])))
        after = program.evolve(graph=graph, tensors=tensors, plan=program.plan.update(rows))
        return PassResult(after, tuple(changes), tuple(kept))

    def ensures(self, before: Program, after: Program) -> None:
        """Each new row of the plan is computed from codes with integer zero-points."""
        old = {site.name for site in before.plan.to_quantize()}
        kinds = (GROUP_EMBEDDING, GROUP_LINEAR)
        found = {site_of(n): n for n in after.graph.nodes if n.target in kinds}
        for site in after.plan.to_quantize():
            if site.name in old:
                continue
            node = found.get(site.name)
            layer = None if node is None else layer_on_codes(node)
            wanted = self.bits, self.group_size
            if node is None or layer is None or (layer.bits, layer.group_size) != wanted:
                raise PostconditionError("it was not quantized", where=site.name)
            _, scale, offset = stored_parts(after, node, layer)
            if not holds(has_integer_zero_points(scale, offset, self.bits).all()):
                raise PostconditionError("a zero-point is not an integer", where=site.name)

    def _quantize(self, path: str, use: Use) -> dict[str, Tensor]:
        linear = use.linear

        def compute(weight: Tensor) -> dict[str, Tensor]:
            matrix = weight.detach() if linear is None else linear.matrix(weight.detach())
            affine = quantize_integer_zero(matrix, self.bits, self.group_size).validate()
            parts = (affine.pack(), affine.scale, affine.offset)
            return {f"{path}.{n}": part for n, part in zip(CODE_NAMES, parts, strict=True)}

        as_stored = linear is None or not (linear.flipped or linear.weight.views)
        return defer(compute, use.tensor, by_rows=as_stored)

    def _row(self, site: Site, path: str, n: int, k: int) -> dict[str, object]:
        reason = _REASONS[EMBEDDING if site.kind == EMBEDDING else ""]
        done = {"decision": QUANTIZE, "reason": reason, "path": path, "n": n, "k": k}
        return done | {
            "bits": self.bits,
            "group_size": self.group_size,
            "frozen_integer_zero": True,
        }

    def _rewrite(
        self, graph: fx.Graph, node: fx.Node, path: str, site: Site, nodes: TensorNodes, k: int
    ) -> fx.Node:
        """Replace a lookup, or the head, by the quantized operator."""
        qweight, scale, offset = (nodes.get(f"{path}.{part}") for part in CODE_NAMES)
        parts = qweight, scale, offset
        linear = match_linear(node)
        with graph.inserting_before(node):
            if linear is None:
                ids, dtype = argument(node, "indices"), getattr(torch, site.dtype)
                options = dtype, self.bits, self.group_size
                new = GroupEmbedding.create(graph, ids, *parts, *options, k)
            else:
                bias = linear.bias
                new = GroupLinear.create(graph, linear.x, *parts, bias, self.bits, self.group_size)
        move_site(node, new)
        node.replace_all_uses_with(new)
        erase_unread([node])
        return new


def embedding_weights(program: Program) -> tuple[list[Use], list[Change]]:
    """A use of each weight that the pass would quantize, and why it would keep the others."""
    chosen, kept = _choose(program.copy_graph(), program)
    return [members[0][0] for members in chosen], kept


def _choose(graph: fx.Graph, program: Program) -> tuple[list[list[Member]], list[Change]]:
    """The weights to quantize, each with all uses (lookups first), and a skip for each kept one."""
    uses = find_uses(graph, program.module)
    heads = find_heads(uses)
    by_storage: dict[int, list[Member]] = defaultdict(list)
    for use, site in _pair(uses, program):
        by_storage[use.storage].append((use, site))
    chosen, kept = [], []
    for members in by_storage.values():
        tables = [m for m in members if m[1].kind == EMBEDDING]
        if not tables and not any(use.node in heads for use, _ in members):
            continue
        why = _why_keep(members, heads)
        if why:
            kept += [Change(site.name, KEPT, why) for _, site in members]
        else:
            chosen.append([*tables, *(m for m in members if m not in tables)])
    return chosen, kept


def _pair(uses: list[Use], program: Program) -> list[Member]:
    """Each use in float with its row; per weight both are in graph order."""
    rows: dict[str, list[Site]] = defaultdict(list)
    for site in program.plan:
        if site.bits is None and site.kind != UNUSED:
            rows[site.weight].append(site)
    found: dict[str, list[Use]] = defaultdict(list)
    for use in uses:
        if use.weight in rows:
            found[use.weight].append(use)
    return [pair for weight, own in found.items() for pair in zip(own, rows[weight], strict=True)]


def _why_keep(members: list[Member], heads: set[fx.Node]) -> str:
    """Why a weight stays in float; empty if it does not."""
    for use, site in members:
        if site.reason == EXCLUDED:
            return EXCLUDED if len(members) == 1 else f"tied to {site.name}, which is excluded"
        lookup = use.node.target is _LOOKUP and _reads_as_stored(use)
        if not lookup and not (use.node in heads and _reads_table(use, members)):
            return f"also read by {site.kind} at {site.name}"
    if members[0][0].tensor.numel() <= _SMALL_ELEMENTS:
        return f"small: {members[0][0].tensor.numel()} weights"
    return ""


def _reads_as_stored(use: Use) -> bool:
    """Whether a lookup reads the table as it is stored."""
    table = argument(use.node, "weight")
    stored = isinstance(table, fx.Node) and table.op == "get_attr"
    return stored and use.tensor.dim() == 2 and use.tensor.is_floating_point()


def _reads_table(head: Use, members: list[Member]) -> bool:
    """Whether a head multiplies by the rows that are looked up, or has its own weight."""
    assert head.matrix is not None
    return len(members) == 1 or storage_key(head.matrix) == storage_key(head.tensor)


def _free_path(path: str, tensors: Mapping[str, Tensor]) -> str:
    """A path below which there is no tensor of a quantized weight yet."""
    while any(f"{path}.{part}" in tensors for part in CODE_NAMES):
        path += "_quantized"
    return path
