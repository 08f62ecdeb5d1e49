"""annotate-linears: decide, for every weight, whether it is quantized, and say why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from qalora_compile.config import one_of
from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import mark_site
from qalora_compile.ir.pattern import feeds_topk
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import EXCLUDED, KEEP, QUANTIZE, UNUSED, Site, SitePlan
from qalora_compile.ir.stages import ANNOTATED, FLOAT
from qalora_compile.ir.tensor_identity import is_finite
from qalora_compile.passes.analysis.find_weight_uses import Use, find_heads, find_uses, name_rows
from qalora_compile.passes.analysis.select_sites import ALL_LINEAR, as_patterns, match_patterns
from qalora_compile.passes.framework.base import Change, Pass, PassResult

_MOST_EXPERTS = 1024
"""A layer with more outputs does not rank experts, but for example a vocabulary."""


@dataclass(frozen=True, kw_only=True)
class AnnotateLinears(Pass):
    """Find the uses of every parameter with two or more dimensions and write the site plan.

    Before:  %1 = aten.linear(%x, @fc.weight, @fc.bias)
    After:   the same; the plan holds a row `fc … quantize`, and %1 is marked with the site's name.

    Fires on: linear, addmm, mm and matmul by a parameter, also through views (a transpose, a slice
    of a packed weight), and the products of stacked experts.
    Leaves alone (a `keep` row with a reason): excluded or untargeted sites, weights that other
    operators read too (an embedding tied to the head), routers, weights of other operators, weights
    that nothing reads.
    Exactness: the graph's function does not change.

    Options:
        targets: `all-linear`, or names, dotted suffixes, globs or `re:` patterns; naming a site
            forces it where the default would keep it.
        exclude: Patterns of sites to keep in float.
        keep_heads: Leave heads that are not named in `targets` to quantize-embeddings.
    """

    name: ClassVar[str] = "annotate-linears"
    consumes: ClassVar[tuple[str, ...]] = (FLOAT, ANNOTATED)
    produces: ClassVar[str | None] = ANNOTATED

    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: tuple[str, ...] = ()
    keep_heads: bool = False

    def __post_init__(self) -> None:
        if self.targets != ALL_LINEAR:
            object.__setattr__(self, "targets", as_patterns(self.targets, "targets"))
        object.__setattr__(self, "exclude", as_patterns(self.exclude, "exclude"))
        one_of("keep_heads", self.keep_heads, (True, False))

    def requires(self, program: Program) -> None:
        """Every floating weight is finite.

        Raises:
            UserInputError: a weight holds NaN or infinite values; it is named.
        """
        for name, tensor in program.tensors().items():
            if isinstance(tensor, nn.Parameter) and not is_finite(tensor):
                raise UserInputError(
                    f"the weight {name} holds NaN or infinite values",
                    where=name,
                    hint="repair or reload the checkpoint; quantizing it would spread the damage",
                )

    def call(self, program: Program) -> PassResult:
        """Write the plan."""
        graph = program.copy_graph()
        uses = find_uses(graph, program.module)
        rows = name_rows(uses, program.tensors())
        heads = find_heads(uses) if self.keep_heads else set()
        decided = _decide(uses, rows, self.targets, self.exclude, heads)
        for use, site in zip(uses, decided, strict=True):
            if use.linear is not None:
                mark_site(use.node, site.name)
        decided += [site for site in program.plan if site.kind == UNUSED]
        after = program.evolve(graph=graph, plan=SitePlan(tuple(decided)))
        return PassResult(
            after,
            tuple(Change(s.name, s.decision, s.reason) for s in decided if s.decision == QUANTIZE),
            tuple(Change(s.name, s.decision, s.reason) for s in decided if s.decision == KEEP),
        )


def _decide(
    uses: list[Use],
    rows: list[Site],
    targets: str | tuple[str, ...],
    exclude: tuple[str, ...],
    heads: set[fx.Node],
) -> list[Site]:
    """Fill in the decision, the reason, and one path for all rows of one reading.

    Raises:
        UserInputError: a pattern of `targets` or `exclude` matches no linear site.
    """
    names = {row.name: (row.name, row.name.split("@")[0], row.path) for row in rows if row.n}
    everything = targets == ALL_LINEAR
    wanted = set(names) if everything else match_patterns(targets, names, "targets")
    barred = match_patterns(exclude, names, "exclude")
    in_float: dict[int, Site] = {}
    for row in rows:
        if not row.n:
            in_float.setdefault(row.storage, row)
    routers = {use.storage for use, row in zip(uses, rows, strict=True) if _is_router(use, row)}
    decided = []
    first: dict[object, tuple[Use, Site]] = {}
    for use, row in zip(uses, rows, strict=True):
        decision, reason, path = KEEP, row.reason, row.path
        if use.linear is not None:
            if everything:
                reason = _why_keep(row, in_float.get(row.storage), routers)
                if use.node in heads:
                    reason = reason or "head: quantize-embeddings takes it, or name it in targets"
            if row.name in barred or row.name not in wanted:
                reason = EXCLUDED if row.name in barred else "not among the targets"
            reason = reason or _clash(use, first)
        if not reason:
            # Codes are grouped along one axis, so rows share the one quantized reading.
            path = first.setdefault(use.reading, (use, row))[1].path
            decision = QUANTIZE
            reason = "linear map by a parameter" if everything else "named in targets"
        decided.append(dataclasses.replace(row, decision=decision, reason=reason, path=path))
    return decided


def _why_keep(row: Site, in_float: Site | None, routers: set[int]) -> str:
    """Why a linear site is kept by default; empty if it is not."""
    if in_float is not None:
        reader = in_float
        return f"tied to {reader.name}, which {reader.kind} reads in float; name it to force it"
    if row.storage in routers:
        return "router: its outputs are ranked by topk; name it to force it"
    return ""


def _is_router(use: Use, row: Site) -> bool:
    return use.linear is not None and row.n <= _MOST_EXPERTS and feeds_topk(use.node)


def _clash(use: Use, first: dict[object, tuple[Use, Site]]) -> str:
    """Why a weight that is quantized for another use cannot serve this use too."""
    for other, row in first.values():
        if other.storage != use.storage or other.reading == use.reading:
            continue
        assert use.matrix is not None and other.matrix is not None
        if other.matrix.mT.shape == use.matrix.shape and other.matrix.mT.stride() == (
            use.matrix.stride()
        ):
            return f"reads the weight of {row.name} transposed"
        if _overlap(use.matrix, other.matrix):
            return f"reads a part of the weight of {row.name}"
    return ""


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two views of one storage share an element."""
    mask = torch.zeros(first.untyped_storage().nbytes() // first.element_size(), dtype=torch.bool)
    places = [mask.as_strided(t.shape, t.stride(), t.storage_offset()) for t in (first, second)]
    places[0].fill_(True)
    return bool(places[1].any())
