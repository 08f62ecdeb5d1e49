"""quantize-groups: replace planned weights by packed codes with a scale and offset per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.config import AUTO, QuantSpec
from qalora_compile.errors import PostconditionError, PreconditionError, UserInputError
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.checkpoint_codes import CheckpointWeight
from qalora_compile.ir.lazy_tensor import Seen, defer, is_lazy, is_placeholder
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.experts import ExpertLinear
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.pattern import LinearMap, get_tensor, match_linear
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.ir.site_plan import Site
from qalora_compile.ir.spec import ON_CODES, layer_on_codes
from qalora_compile.ir.stages import ANNOTATED, CODE_NAMES, QUANTIZED
from qalora_compile.passes.framework.base import Change, Pass, PassResult, data_field
from qalora_compile.passes.framework.rewrite import TensorNodes, freeze
from qalora_compile.progress import track
from qalora_compile.quantizers import (
    QuantizedWeight,
    as_stored,
    data_needed,
    get_method,
    get_quantizer,
    needs_data,
    quantize_weight,
    without_data,
)
from qalora_compile.quantizers.sequential_calibration import replace_in_order
from qalora_compile.quantizers.statistics import ActivationStatistics

_STORED = "stored"


@dataclass(frozen=True, kw_only=True)
class QuantizeGroups(QuantSpec, Pass):
    """Quantize every weight that the plan selects, once per storage, and freeze the rest.

    Before:  %1 = aten.linear(%x, @fc.weight, @fc.bias)
    After:   %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, @fc.bias, 4, 32)

    Fires on: the nodes of the plan's `quantize` rows. A weight used at several sites is quantized
    once and its tensors are shared; stacked experts become one `qalora.expert_linear`, quantized
    expert by expert.
    Leaves alone: every other node. All remaining parameters stop requiring gradients.
    Exactness: lossy; the program computes the model with its weights replaced by
    `scale · q + offset` (arXiv 2309.14717, Eq. 1).

    With calibration data, layers are quantized in graph order, each by statistics of its input
    after the layers before it were quantized (`quantizers.sequential_calibration`). Without, only
    the weights count. Stacked experts have no statistics: methods that need them leave experts to
    `hqq`, and the skips say so.

    Run again without the data on a graph of placeholders (`recipes.replay`), a calibrated method
    gives the same graph, for the tensors of the first run.

    Options: the fields of `QuantSpec`. Bits and group size that assign-bits has set for a row take
    precedence; with bits `auto` every row must have them.

    Attributes:
        calibration: Calls of the program, tuples or mappings, for whose inputs the weights are
            quantized, or None. Not an option, as text cannot carry it.
        checkpoints: Where a method that trains may save its work, to go on with it if it is killed.
        stored: Codes that weights already have, by path (`recipes.reuse_codes`). They are kept with
            any method; assign-bits must have planned their bits and group sizes.
    """

    name: ClassVar[str] = "quantize-groups"
    consumes: ClassVar[tuple[str, ...]] = (ANNOTATED,)
    produces: ClassVar[str | None] = QUANTIZED
    lossy: ClassVar[bool] = True

    calibration: tuple[Call, ...] | None = data_field(None)
    checkpoints: Path | None = data_field(None)  # noqa: RUF009
    stored: Mapping[str, tuple[CheckpointWeight, ...]] | None = data_field(None)

    def requires(self, program: Program) -> None:
        """Check that there are a layer to quantize, its bits, and the data that the method needs.

        Raises:
            UserInputError: there is none, or data are missing, or not those that the method needs.
            UnsupportedError: the method cannot quantize such a model.
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
            if self.bits == AUTO and site.chosen_bits is None:
                raise PreconditionError(
                    "bits is 'auto', and no bits were chosen for the site",
                    where=site.name,
                    hint="qc.quantize_groups(program, spec, calibration=[…]) chooses them; in a "
                    "pipeline, assign-bits gives them",
                )
        weights = [_weight_of(site, program) for site in program.plan.to_quantize()]
        calibrated = self.calibration is not None
        if calibrated and any(map(is_lazy, weights)):
            raise UserInputError(
                "a program whose weights are not in memory cannot be calibrated",
                hint="load the model, or use a method that needs no data",
            )
        needed = needs_data(self.method) and not calibrated
        stored = self.stored or {}
        free = [
            weight
            for site, weight in zip(program.plan.to_quantize(), weights, strict=True)
            if site.path not in stored
        ]
        if needed and not all(map(is_placeholder, free)):
            raise data_needed(self.method)
        check = get_method(self.method).check
        if check is not None and self.calibration is not None:
            check(program, self.calibration)

    def call(self, program: Program) -> PassResult:
        """Quantize and rewrite."""
        graph = program.copy_graph()
        tensors = freeze(program.tensors())
        rows = {site.name: site for site in program.plan.to_quantize()}
        linears = _linears_of(graph, rows)
        changes, seen = [], Seen()
        weights = [s for s in program.plan.weights_to_quantize() if s.name in linears]
        calls = self.calibration
        made = {} if calls is None else self._calibrate(calls, weights, linears, program)
        uncalibrated = [s for s in weights if calls is not None and s.path not in made]
        for site in track(weights, "quantize"):
            if site.path not in made:
                made[site.path] = self._by_weight(site, linears[site.name], program, seen)
            tensors |= made[site.path].tensors
            why = "; ".join(made[site.path].remarks)
            bits = self.spec_of(site).width
            changes.append(Change(site.path, f"{site.shape} to {bits} bits", why))
        nodes = TensorNodes(graph)
        for name, linear in linears.items():
            self._rewrite(graph, linear.node, rows[name], nodes)
        specs = {name: self.spec_of(site) for name, site in rows.items()}
        done = {"chosen_bits": None, "chosen_group": None}
        plan = program.plan.update({n: _described(s) | done for n, s in specs.items()})
        skips = [Change(s.name, "kept in float", s.reason) for s in plan if s.bits is None]
        for site in uncalibrated:
            why = f"stacked experts: quantized by their weights alone, {without_data(self).method}"
            skips.append(Change(site.name, "not calibrated", why))
        quantized = program.evolve(graph=graph, tensors=tensors, plan=plan)
        return PassResult(self._finish(program, quantized), tuple(changes), tuple(skips))

    def ensures(self, before: Program, after: Program) -> None:
        """Every `quantize` row is computed from codes of its bits and group size."""
        layers = {site_of(n): layer_on_codes(n) for n in after.graph.nodes if n.target in ON_CODES}
        computed = {site: (layer.bits, layer.group_size) for site, layer in layers.items()}
        for site in before.plan.to_quantize():
            spec = self.spec_of(site)
            if computed.get(site.name) != (spec.bits, spec.group_size):
                raise PostconditionError("the site was not quantized", where=site.name)

    def spec_of(self, site: Site) -> QuantSpec:
        """How the weight of a planned row is quantized."""
        options = {f.name: getattr(self, f.name) for f in fields(QuantSpec)}
        chosen = {"bits": site.chosen_bits, "group_size": site.chosen_group, "budget": None}
        return QuantSpec(**options | (chosen if site.chosen_bits is not None else {}))

    def _calibrate(
        self,
        calls: Sequence[Call],
        weights: Sequence[Site],
        linears: Mapping[str, LinearMap],
        program: Program,
    ) -> dict[str, _Made]:
        """Codes, scale and offset of each weight that has statistics, by path, in graph order."""
        sites = {site.path: site for site in weights}
        made: dict[str, _Made] = {}

        def quantize(path: str, statistics: ActivationStatistics) -> Tensor:
            site = sites[path]
            weight = linears[site.name].matrix(_weight_of(site, program).detach())
            quantizer = self._quantizer_of(site)
            chosen = quantizer(weight, statistics)
            tensors = _named(site, _parts(site, [chosen.affine]))
            made[path] = _Made(tensors, (quantizer.method, *chosen.notes))
            return chosen.affine.dequantize()

        replace_in_order(program, calls, quantize)
        return made

    def _finish(self, program: Program, quantized: Program) -> Program:
        """What the method makes of all weights together, if it does that and there are data."""
        finish = get_method(self.method).finish
        if finish is None or self.calibration is None:
            return quantized
        return finish(
            program,
            quantized,
            self,
            self.calibration,
            keep=frozenset(self.stored or ()),
            checkpoints=self.checkpoints,
        )

    def _by_weight(self, site: Site, linear: LinearMap, program: Program, seen: Seen) -> _Made:
        """Codes, scale and offset of a weight; experts one by one, stacked along their axis."""
        quantizer = without_data(self)._quantizer_of(site)

        def compute(weight: Tensor) -> dict[str, Tensor]:
            matrix = linear.matrix(weight.detach())
            matrices = matrix.unbind() if site.experts else [matrix]
            found = [quantizer(m, None, expert=at) for at, m in enumerate(matrices)]
            return _parts(site, [chosen.affine for chosen in found])

        spec = quantizer.spec
        key = (site.n, site.k, site.experts, spec.bits, spec.group_size)
        parts = defer(compute, _weight_of(site, program), seen=seen, key=key)
        return _Made(_named(site, parts), (quantizer.method,))

    def _quantizer_of(self, site: Site) -> _QuantizerOf:
        """The quantizer of a weight: the method, or the codes that it already has."""
        held = (self.stored or {}).get(site.path, ())
        return _QuantizerOf(site.path, self.spec_of(site), tuple(each.affine for each in held))

    def _rewrite(self, graph: fx.Graph, node: fx.Node, site: Site, nodes: TensorNodes) -> None:
        """Replace a linear map by the quantized operator."""
        spec = self.spec_of(site)
        linear = match_linear(node)  # match again: an earlier rewrite may have replaced x
        assert linear is not None, "it matched before"
        with graph.inserting_before(node):
            qweight, scale, offset = (nodes.get(f"{site.path}.{part}") for part in CODE_NAMES)
            operands = linear.x, qweight, scale, offset
            if site.experts:
                group_offsets = linear.group_offsets
                new = ExpertLinear.create(graph, *operands, group_offsets, spec.width, spec.group)
            else:
                new = GroupLinear.create(graph, *operands, linear.bias, spec.width, spec.group)
        move_site(node, new)
        node.replace_all_uses_with(new)
        erase_unread([node])


def _described(spec: QuantSpec) -> dict[str, object]:
    """The fields of the plan for a quantized weight."""
    integer = spec.zero_point == "integer"
    return {"bits": spec.bits, "group_size": spec.group_size, "integer_zero_point": integer}


@dataclass(frozen=True)
class _QuantizerOf:
    """The quantizer of the weight at a path: the specification's method, or stored codes."""

    path: str
    spec: QuantSpec
    stored: tuple[GroupAffine, ...]

    @property
    def method(self) -> str:
        return _STORED if self.stored else self.spec.method

    def __call__(
        self, weight: Tensor, statistics: ActivationStatistics | None, *, expert: int = 0
    ) -> QuantizedWeight:
        """Quantize one matrix, and report the result.

        Raises:
            UserInputError: it cannot be quantized; the path is named.
        """
        if self.stored:
            quantizer = as_stored(self.stored[expert])
            spec = replace(self.spec, refine_offsets=False)
        else:
            quantizer, spec = get_quantizer(self.spec.method), self.spec
        try:
            return quantize_weight(
                quantizer, weight, spec, path=self.path, statistics=statistics, method=self.method
            )
        except UserInputError as error:  # the quantizer does not know the path
            raise UserInputError(
                error.what, where=error.where or self.path, hint=error.hint
            ) from error


@dataclass(frozen=True)
class _Made:
    """The tensors of a quantized weight, by name, and the method with its remarks."""

    tensors: dict[str, Tensor]
    remarks: tuple[str, ...]


def _weight_of(site: Site, program: Program) -> Tensor:
    weight = get_tensor(program.module, site.weight)
    assert weight is not None, "the plan was made from this module"
    return weight


def _parts(site: Site, stack: Sequence[GroupAffine]) -> dict[str, Tensor]:
    """The tensors of a site with one matrix, or with one for each expert."""
    parts = {
        "qweight": [affine.pack() for affine in stack],
        "scale": [affine.scale for affine in stack],
        "offset": [affine.offset for affine in stack],
    }
    return {
        part: torch.stack(values) if site.experts else values[0] for part, values in parts.items()
    }


def _named(site: Site, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in the program."""
    return {f"{site.path}.{part}": tensor for part, tensor in parts.items()}


def _linears_of(graph: fx.Graph, rows: Mapping[str, Site]) -> dict[str, LinearMap]:
    """The linear map of each row, by site name."""
    marked = {site_of(node): node for node in graph.nodes}
    found = {name: match_linear(marked[name]) for name in rows if name in marked}
    return {name: linear for name, linear in found.items() if linear is not None}
