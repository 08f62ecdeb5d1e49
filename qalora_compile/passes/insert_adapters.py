"""insert-adapters: add a trainable pooled low-rank adapter to every quantized site."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from qalora_compile.config import AUTO, AdapterSpec
from qalora_compile.config.adapter import AFFINE_KINDS, LORA, QAT
from qalora_compile.errors import PostconditionError, PreconditionError, UserInputError
from qalora_compile.ir.adapters.base import AdapterSettings
from qalora_compile.ir.adapters.find import adapter_kind, find_adapters
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.integer_zero_linear import INTEGER
from qalora_compile.ir.pattern import get_tensor
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import Site
from qalora_compile.ir.spec import ON_CODES
from qalora_compile.ir.stages import ADAPTED, ADAPTER_NAMES, GAIN, QUANTIZED, SHIFT
from qalora_compile.passes.analysis.select_sites import check_paths, parse_ranks
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.rewrite import TensorNodes


@dataclass(frozen=True, kw_only=True)
class InsertAdapters(AdapterSpec, Pass):
    """Add `scaling · f · (S(x) Aᵀ) Bᵀ` to the output of every quantized site.

    Before:  %1 = qalora.group_linear(%x, …, 4, 32)
    After:   %1 = qalora.group_linear(%x, …, 4, 32)
             %2 = qalora.group_sum(%x, 32)
             %3 = qalora.pooled_adapter(%2, @fc.lora_A, @fc.lora_B, scaling · f)
             %4 = aten.add.Tensor(%1, %3)

    Or, with `zero_point="integer"` or `kind="scale"`, adapters that keep zero-points integers:

    After:   %1 = qalora.integer_zero_linear(%x, …, 4, 32, @fc.lora_A, @fc.lora_B, s · f, integer)

    Or, with kind `"affine"`, or `"qat"`, which has `@fc.adapter_shift` in the place of None:

    After:   %1 = qalora.affine_linear(%x, …, 4, 32, @fc.lora_A, …, @fc.adapter_gain, None, …)

    Fires on: every group_linear, and every expert_linear, with an adapter for each expert
    (`qalora.expert_adapter`). Sites that share a weight share its adapter. With `dropout`, an
    `aten.dropout` before each adapter acts in the program's training mode.
    Leaves alone: sites of `Site.frozen_integer_zero`, and everything else.
    Exactness: exact; B starts at zero, so the function does not change.

    Options: the fields of `AdapterSpec`, but neither rank `auto` nor init `svd`, which need the
    float weights: `api.insert_adapters` resolves them and passes the ranks. `ranks`: `path=rank`
    for each weight (`Site.path`) whose rank is not `rank`.
    """

    name: ClassVar[str] = "insert-adapters"
    consumes: ClassVar[tuple[str, ...]] = (QUANTIZED,)
    produces: ClassVar[str | None] = ADAPTED

    ranks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value in (("rank", AUTO), ("init", "svd")):
            if getattr(self, field) == value:
                raise UserInputError(
                    f"{field} is {value!r}, for which the pass lacks the float weights",
                    hint="qc.insert_adapters(program, spec, source=float_program) can",
                )
        parse_ranks(self.ranks)

    @cached_property
    def _ranks(self) -> Mapping[str, int]:
        return parse_ranks(self.ranks)

    def requires(self, program: Program) -> None:
        """Check that the pooling group is a multiple of every quantization group.

        Raises:
            PreconditionError: it is not, so the adapter would not be constant inside a group; or
                the adapter has to keep zero-points integers that are not.
            UserInputError: a path in `ranks` is not of a quantized weight.
        """
        check_paths(self._ranks, program.plan, "ranks")
        for site in program.plan.to_adapt():
            pooled, group = self.pool_of(site), site.group_size or 1
            if self._in_layer and site.experts:
                raise PreconditionError(
                    f"stacked experts have only pooled adapters, none of kind {self._in_layer!r}",
                    where=site.name,
                    hint="exclude it",
                )
            if self.keeps_integer_zero_point and not site.integer_zero_point:
                raise PreconditionError(
                    "its zero-points are not integers, but the adapter has to keep them integers",
                    where=site.name,
                    hint="quantize with QuantSpec(zero_point='integer') "
                    "(finetune --zero-point integer)",
                )
            if pooled % group:
                raise PreconditionError(
                    f"the adapter pools groups of {pooled}, the weight is quantized in groups of "
                    f"{group}: the update is not constant inside a quantization group",
                    where=site.name,
                    hint=f"use an adapter group_size that is a multiple of {group}",
                )

    def call(self, program: Program) -> PassResult:
        """Insert."""
        graph = program.copy_graph()
        rows = {site.name: site for site in program.plan.to_adapt()}
        adapters = self._make_adapters(program)
        nodes = TensorNodes(graph)
        changes = []
        for node in list(graph.nodes):
            site = rows.get(site_of(node) or "")
            if node.target not in ON_CODES or site is None:
                continue
            kind = adapter_kind(node, self._in_layer)
            trained = [nodes.get(f"{site.path}.{part}") for part in kind.trains]
            kind.insert(graph, node, trained, self._settings_of(site))
            changes.append(Change(site.name, f"adapter of rank {self.rank_of(site)}", self.pooling))
        plan = program.plan.update(
            {
                name: {
                    "rank": self.rank_of(s),
                    "integer_zero_point": s.integer_zero_point and self.keeps_integer_zero_point,
                }
                for name, s in rows.items()
            }
        )
        tensors = program.tensors() | adapters
        frozen = [site for site in program.plan if site.frozen_integer_zero]
        notes = (*program.notes, *self._rank_notes(program))
        made = program.evolve(graph=graph, tensors=tensors, plan=plan)
        made = dataclasses.replace(made, notes=notes)
        return PassResult(
            made.train() if program.module.training else made,
            tuple(changes),
            tuple(Change(s.name, "no adapter", "its zero-points stay integers") for s in frozen),
        )

    def ensures(self, before: Program, after: Program) -> None:
        """Each site got one adapter, and none changes its layer yet."""
        found = len(find_adapters(after.graph))
        wanted = len(after.plan.to_adapt())
        if found != wanted:
            raise PostconditionError(f"{found} adapters for {wanted} sites")
        for name, parameter in after.named_adapter_parameters():
            begins = name.endswith(ADAPTER_NAMES[0]) or name in after.trained
            if not begins and bool(parameter.any()):
                raise PostconditionError("an adapter does not start at zero", where=name)

    def pool_of(self, site: Site) -> int:
        """Width of a pooling group of a site."""
        return self.group_size if self.group_size is not None else (site.group_size or 1)

    def rank_of(self, site: Site) -> int:
        """The rank of a site's adapter."""
        assert isinstance(self.rank, int), "checked at construction"
        return self._ranks.get(site.path, self.rank)

    def factor_of(self, site: Site) -> float:
        """Scaling · f: what B A is multiplied by."""
        return self.scaling_at(self.rank_of(site)) * self._pooling(site)

    def start_of(self, site: Site) -> float:
        """The bound of A's initial values: 1 / (f √K), that of a plain LoRA divided by f.

        Kind `scale` has 1 / (f √L), as its updates are fractions of a scale.
        """
        width = group_count(site.k, self.pool_of(site)) if self.kind == "scale" else site.k
        return 1.0 / (self._pooling(site) * math.sqrt(width))

    def _rank_notes(self, program: Program) -> Iterator[str]:
        """A note if ranks exceed what the pooled inputs have: `[r, L]` times `[L]` has rank L."""
        groups = {
            s.path: group_count(s.k, self.pool_of(s)) for s in program.plan.weights_to_adapt()
        }
        rank = {path: self._ranks.get(path, self.rank) for path in groups}
        over = [path for path, count in groups.items() if int(rank[path]) > count]
        if not over:
            return
        most, least = max(groups.values()), min(groups[path] for path in over)
        if len(over) == len(groups):
            yield (
                f"rank {self.rank} is above the number of groups of every layer: rank {most} can "
                "learn the same with fewer parameters"
            )
        else:
            yield (
                f"rank {self.rank} is above the number of groups of {len(over)} of {len(groups)} "
                f"layers, which have {least} groups or more: what is above it learns nothing"
            )

    @property
    def _in_layer(self) -> str | None:
        """The kind of adapters that one operator computes with the layer; None for others."""
        if self.kind != LORA:
            return self.kind
        return INTEGER if self.keeps_integer_zero_point else None

    def _settings_of(self, site: Site) -> AdapterSettings:
        return AdapterSettings(self.factor_of(site), self.pool_of(site), float(self.dropout))

    def _pooling(self, site: Site) -> float:
        pool = self.pool_of(site)
        return self.pooling_factor(pool, group_count(site.k, pool))

    def _make_adapters(self, program: Program) -> dict[str, Tensor]:
        """A: uniform within ± `start_of`; all others: zero."""
        generator = torch.Generator().manual_seed(self.seed)
        made: dict[str, Tensor] = {}
        for site in program.plan.weights_to_adapt():
            scale = get_tensor(program.module, f"{site.path}.scale")
            assert scale is not None, "a quantized site has a scale"
            groups, rank = group_count(site.k, self.pool_of(site)), self.rank_of(site)
            lead = (site.experts,) if site.experts else ()
            start = torch.rand(*lead, rank, groups, generator=generator, dtype=torch.float64)
            lora_a = ((2 * start - 1) * self.start_of(site)).to(scale.dtype)
            lora_b = torch.zeros(*lead, site.n, rank, dtype=scale.dtype)
            made[f"{site.path}.lora_A"] = nn.Parameter(lora_a)
            made[f"{site.path}.lora_B"] = nn.Parameter(lora_b)
            if self.kind in AFFINE_KINDS:
                made[f"{site.path}.{GAIN}"] = nn.Parameter(
                    torch.zeros(scale.shape, dtype=scale.dtype)
                )
            if self.kind == QAT:
                shift = torch.zeros(site.n, site.k, dtype=scale.dtype)
                made[f"{site.path}.{SHIFT}"] = nn.Parameter(shift)
        return made
