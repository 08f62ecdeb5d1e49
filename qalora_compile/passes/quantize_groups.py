"""quantize-groups: replace planned weights by packed codes with a scale and offset per group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from qalora_compile.config import AUTO, QuantSpec
from qalora_compile.errors import PostconditionError, PreconditionError, UserInputError
from qalora_compile.ir.deferred import defer, keep_recipe
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.pattern import LinearMap, get_tensor, match_linear
from qalora_compile.ir.plan import Site
from qalora_compile.ir.program import ANNOTATED, CODE_NAMES, QUANTIZED, Program
from qalora_compile.ir.spec import EXPERT_LINEAR, GROUP_LINEAR, ON_CODES
from qalora_compile.passes.base import Change, Pass, PassResult
from qalora_compile.passes.rewrite import TensorNodes
from qalora_compile.progress import track
from qalora_compile.quantizers import get_quantizer


@dataclass(frozen=True, kw_only=True)
class QuantizeGroups(QuantSpec, Pass):
    """Quantize every weight that the plan says to, once per storage, and freeze the rest.

    Before:  %1 = aten.linear(%x, @fc.weight, @fc.bias)
    After:   %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 4, 32)

    Fires on: the nodes of the plan's `quantize` rows. A weight used at several sites is quantized
    once and its tensors are shared; stacked experts become one `qalora.expert_linear`, quantized
    expert by expert.
    Leaves alone: every other node. All remaining parameters stop requiring gradients.
    Exactness: lossy; the program computes the model with its weights replaced by
    `scale · q + offset` (arXiv 2309.14717, Eq. 1).

    Options: the fields of `QuantSpec`. A row that assign-bits gave bits and a group size keeps
    them; with bits `auto` every row must have them.
    """

    name: ClassVar[str] = "quantize-groups"
    consumes: ClassVar[tuple[str, ...]] = (ANNOTATED,)
    produces: ClassVar[str | None] = QUANTIZED

    def requires(self, program: Program) -> None:
        """The plan has something to quantize, and bits for all of it.

        Raises:
            UserInputError: it has nothing.
            PreconditionError: bits are missing.
        """
        if not program.plan.to_quantize():
            kept = "; ".join(f"{s.name}: {s.reason}" for s in program.plan if s.n)
            raise UserInputError(
                "there is no linear layer to quantize",
                where=kept or "the model has no linear map by a parameter",
                hint="name sites in targets, or check that the model is the one you meant",
            )
        for site in program.plan.to_quantize():
            if self.bits == AUTO and site.bits is None:
                raise PreconditionError(
                    "bits is 'auto', and no bits were chosen for the site",
                    where=site.name,
                    hint="qc.quantize_groups(program, spec, calibration=[…]) chooses them; in a "
                    "pipeline, assign-bits gives them",
                )

    def call(self, program: Program) -> PassResult:
        """Quantize and rewrite."""
        graph = program.copy_graph()
        tensors = {name: _freeze(t) for name, t in program.tensors().items()}
        tensors = _keep_ties(program.tensors(), tensors)
        rows = {site.name: site for site in program.plan.to_quantize()}
        linears = _linears_of(graph, rows)
        changes = []
        weights = [s for s in program.plan.weights_to_quantize() if s.name in linears]
        for site in track(weights, "quantize"):
            tensors |= self._quantize(site, linears[site.name], program)
            bits = self.spec_of(site).width
            changes.append(Change(site.path, f"{site.shape} to {bits} bits", self.method))
        nodes = TensorNodes(graph)
        for name, linear in linears.items():
            self._rewrite(graph, linear.node, rows[name], nodes)
        specs = {name: self.spec_of(site) for name, site in rows.items()}
        plan = program.plan.update(
            {n: {"bits": s.bits, "group_size": s.group_size} for n, s in specs.items()}
        )
        return PassResult(
            program.evolve(graph=graph, tensors=tensors, plan=plan),
            tuple(changes),
            tuple(Change(s.name, "kept in float", s.reason) for s in plan if s.bits is None),
        )

    def ensures(self, before: Program, after: Program) -> None:
        """Every `quantize` row is computed on codes of its bits and group."""
        computed = {site_of(n): n.args[5:7] for n in after.graph.nodes if n.target in ON_CODES}
        for site in before.plan.to_quantize():
            spec = self.spec_of(site)
            if computed.get(site.name) != (spec.bits, spec.group_size):
                raise PostconditionError("the site was not quantized", where=site.name)

    def spec_of(self, site: Site) -> QuantSpec:
        """How the weight of a planned row is quantized."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(QuantSpec)}
        chosen = {"bits": site.bits, "group_size": site.group_size, "budget": None}
        return QuantSpec(**options | (chosen if site.bits is not None else {}))

    def _quantize(self, site: Site, linear: LinearMap, program: Program) -> dict[str, Tensor]:
        """Codes, scale and offset of a weight; experts one by one, stacked along their axis."""
        weight = get_tensor(program.module, site.weight)
        assert weight is not None, "the plan was made from this module"
        quantizer, spec = get_quantizer(self.method), self.spec_of(site)

        def compute(weight: Tensor) -> dict[str, Tensor]:
            matrix = linear.matrix(weight.detach())
            matrices = matrix.unbind() if site.experts else [matrix]
            stack = [quantizer(part, spec).validate() for part in matrices]
            parts = {
                "qweight": [affine.pack() for affine in stack],
                "scale": [affine.scale for affine in stack],
                "offset": [affine.offset for affine in stack],
            }
            return {
                f"{site.path}.{part}": torch.stack(values) if site.experts else values[0]
                for part, values in parts.items()
            }

        return defer(compute, weight)

    def _rewrite(self, graph: fx.Graph, node: fx.Node, site: Site, nodes: TensorNodes) -> None:
        """Put the operator on codes in the place of a linear map."""
        spec = self.spec_of(site)
        linear = match_linear(node)  # again: an earlier rewrite may have given it another x
        assert linear is not None, "it matched before"
        with graph.inserting_before(node):
            parts = [nodes.get(f"{site.path}.{part}") for part in CODE_NAMES]
            last = linear.ends if site.experts else linear.bias
            new = graph.call_function(
                EXPERT_LINEAR if site.experts else GROUP_LINEAR,
                (linear.x, *parts, last, spec.bits, spec.group_size),
            )
        move_site(node, new)
        node.replace_all_uses_with(new)
        erase_unread([node])


def _linears_of(graph: fx.Graph, rows: Mapping[str, Site]) -> dict[str, LinearMap]:
    """The linear map of each row, by site name."""
    marked = {site_of(node): node for node in graph.nodes}
    found = {name: match_linear(marked[name]) for name in rows if name in marked}
    return {name: linear for name, linear in found.items() if linear is not None}


def _freeze(tensor: Tensor) -> Tensor:
    """The same memory as a parameter that takes no gradient; the user's model is not touched."""
    if not isinstance(tensor, nn.Parameter):
        return tensor
    frozen: Tensor = keep_recipe(tensor, nn.Parameter(tensor.detach(), requires_grad=False))
    return frozen


def _keep_ties(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names that shared one parameter object share one again."""
    first = {id(before[name]): after[name] for name in reversed(before)}
    return {name: first[id(before[name])] for name in after}
