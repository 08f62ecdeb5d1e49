"""insert-adapters: a trainable pooled low-rank adapter beside every quantized site."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from qalora_compile.config import AdapterSpec
from qalora_compile.errors import PostconditionError, PreconditionError
from qalora_compile.ir.affine import group_count
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.pattern import get_tensor
from qalora_compile.ir.plan import Site
from qalora_compile.ir.program import ADAPTED, QUANTIZED, Program
from qalora_compile.ir.spec import (
    ADAPTERS,
    EXPERT_ADAPTER,
    EXPERT_LINEAR,
    GROUP_SUM,
    ON_CODES,
    POOLED_ADAPTER,
)
from qalora_compile.passes.base import Change, Pass, PassResult
from qalora_compile.passes.rewrite import TensorNodes

_ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True, kw_only=True)
class InsertAdapters(AdapterSpec, Pass):
    """Add `scaling · f · (S(x) Aᵀ) Bᵀ` to the output of every quantized site.

    Before:  %1 = qalora.group_linear(%x, …, 4, 32)
    After:   %1 = qalora.group_linear(%x, …, 4, 32)
             %2 = qalora.group_sum(%x, 32)
             %3 = qalora.pooled_adapter(%2, @fc.lora_A, @fc.lora_B, scaling · f)
             %4 = aten.add.Tensor(%1, %3)

    Fires on: every group_linear, and every expert_linear, whose experts have an adapter each
    (`qalora.expert_adapter`). Sites that share a weight share its adapter.
    Leaves alone: sites whose zero-points stay whole (`Site.whole`), and everything else.
    Exactness: exact; B starts at zero, so the function does not change.

    Options: the fields of `AdapterSpec`.
    """

    name: ClassVar[str] = "insert-adapters"
    consumes: ClassVar[tuple[str, ...]] = (QUANTIZED,)
    produces: ClassVar[str | None] = ADAPTED

    def requires(self, program: Program) -> None:
        """The pooling group is a multiple of every quantization group.

        Raises:
            PreconditionError: it is not: the adapter would not be constant inside a group.
        """
        for site in _adapted(program.plan.to_quantize()):
            pooled, group = self._pool_of(site), site.group_size or 1
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
        rows = {site.name: site for site in _adapted(program.plan.to_quantize())}
        adapters = self._make_adapters(program)
        nodes = TensorNodes(graph)
        changes = []
        for node in list(graph.nodes):
            site = rows.get(site_of(node) or "")
            if node.target not in ON_CODES or site is None:
                continue
            self._insert(graph, node, site, nodes)
            changes.append(Change(site.name, f"adapter of rank {self.rank}", self.pooling))
        plan = program.plan.update({name: {"rank": self.rank} for name in rows})
        tensors = program.tensors() | adapters
        whole = [site for site in program.plan if site.whole]
        return PassResult(
            program.evolve(graph=graph, tensors=tensors, plan=plan),
            tuple(changes),
            tuple(Change(s.name, "no adapter", "its zero-points stay whole") for s in whole),
        )

    def ensures(self, before: Program, after: Program) -> None:
        """Each site got one adapter, and each adapter's B is zero."""
        found = sum(n.target in ADAPTERS for n in after.graph.nodes)
        wanted = len(_adapted(after.plan.to_quantize()))
        if found != wanted:
            raise PostconditionError(f"{found} adapters for {wanted} sites")
        for name, parameter in after.named_adapter_parameters():
            if name.endswith("lora_B") and bool(parameter.any()):
                raise PostconditionError("an adapter does not start at zero", where=name)

    def _pool_of(self, site: Site) -> int:
        return self.group_size if self.group_size is not None else (site.group_size or 1)

    def _factor(self, site: Site) -> float:
        pool = self._pool_of(site)
        return self.pooling_factor(pool, group_count(site.k, pool))

    def _make_adapters(self, program: Program) -> dict[str, Tensor]:
        """A: uniform within ±1 / (f √K), as a plain LoRA's A of width K pooled by f; B: zero."""
        generator = torch.Generator().manual_seed(self.seed)
        made: dict[str, Tensor] = {}
        for site in _adapted(program.plan.weights_to_quantize()):
            scale = get_tensor(program.module, f"{site.path}.scale")
            assert scale is not None, "a quantized site has a scale"
            groups = group_count(site.k, self._pool_of(site))
            bound = 1.0 / (self._factor(site) * math.sqrt(site.k))
            lead = (site.experts,) if site.experts else ()
            start = torch.rand(*lead, self.rank, groups, generator=generator, dtype=torch.float64)
            lora_a = ((2 * start - 1) * bound).to(scale.dtype)
            made[f"{site.path}.lora_A"] = nn.Parameter(lora_a)
            made[f"{site.path}.lora_B"] = nn.Parameter(torch.zeros(*lead, site.n, self.rank, dtype=scale.dtype))
        return made

    def _insert(self, graph: fx.Graph, node: fx.Node, site: Site, nodes: TensorNodes) -> None:
        lora_a, lora_b = (nodes.get(f"{site.path}.{part}") for part in ("lora_A", "lora_B"))
        with graph.inserting_after(node):
            total = graph.call_function(_ADD, (node, node))
        node.replace_all_uses_with(total)
        with graph.inserting_before(total):
            pooled = graph.call_function(GROUP_SUM, (node.args[0], self._pool_of(site)))
            operands: list[Any] = [pooled, lora_a, lora_b]
            if node.target is EXPERT_LINEAR:
                operands.append(node.args[4])  # ends
            update = graph.call_function(
                EXPERT_ADAPTER if node.target is EXPERT_LINEAR else POOLED_ADAPTER,
                (*operands, self.scaling * self._factor(site)),
            )
        total.args = (node, update)
        move_site(node, total)


def _adapted(sites: Iterable[Site]) -> list[Site]:
    """The sites that get an adapter."""
    return [site for site in sites if not site.whole]
