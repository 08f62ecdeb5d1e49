"""The base of all legalize passes: each quantized layer becomes a kernel of the target."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from qalora_compile.errors import PostconditionError, PreconditionError, UnsupportedError
from qalora_compile.ir.affine import has_integer_zero_points
from qalora_compile.ir.lazy_tensor import Seen, defer, holds
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.embedding import GroupEmbedding
from qalora_compile.ir.ops.experts import ExpertLinear
from qalora_compile.ir.ops.linear import GroupLinear, GroupSum, PadGroups
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import Site
from qalora_compile.ir.spec import (
    GROUP_EMBEDDING,
    ON_CODES,
    layer_on_codes,
    stored_parts,
)
from qalora_compile.ir.stages import ADAPTED, FOLDED, HIGH_CODES, QUANTIZED
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.rewrite import TensorNodes
from qalora_compile.progress import track

_ATEN = torch.ops.aten
_ON_CODES = ON_CODES | {GROUP_EMBEDDING}


class Layer(NamedTuple):
    """The format of a layer's weight; `integer_zero_point` as `Site.has_integer_zero_point`."""

    bits: int
    group_size: int
    k: int
    integer_zero_point: bool = False


@dataclass(frozen=True)
class Lowered:
    """The nodes of a layer's lowered tensors; for experts each is a list with a node per expert.

    Attributes:
        parts: Codes, scale and zero-point.
        correction: C, or None where there is no correction.
    """

    parts: tuple[Any, Any, Any]
    correction: Any


@dataclass(frozen=True)
class LegalizePass(Pass):
    """Rewrite every group_linear, expert_linear and group_embedding into one target's operators.

    A subclass defines how a weight is stored (`lower_weight`) and described (`describe`), and which
    nodes compute the layer (`emit`) or look its rows up (`emit_rows`). A weight that is both looked
    up and multiplied by is stored once.
    """

    consumes: ClassVar[tuple[str, ...]] = (QUANTIZED, ADAPTED, FOLDED)
    kernel: ClassVar[str] = ""
    """Name of the target's kernel, for messages."""
    by_rows: ClassVar[bool] = True
    """Rows with integer zero-points are stored separately: a large weight is made in parts."""
    shares_scale: ClassVar[bool] = True
    """Two planes of one weight may read one tensor of scales."""

    @abstractmethod
    def lower_weight(
        self, qweight: Tensor, scale: Tensor, offset: Tensor, layer: Layer
    ) -> dict[str, Tensor]:
        """The stored tensors of one matrix, by their names below the site's path."""

    @abstractmethod
    def describe(self, layer: Layer) -> tuple[str, str]:
        """What a layer becomes, and how its stored form differs."""

    @abstractmethod
    def emit(
        self, graph: fx.Graph, own: GroupLinear | ExpertLinear, layer: Layer, lowered: Lowered
    ) -> fx.Node:
        """Insert the target's nodes for a layer, or for one of stacked experts."""

    @abstractmethod
    def emit_rows(self, graph: fx.Graph, ids: fx.Node, layer: Layer, lowered: Lowered) -> fx.Node:
        """Insert the lookup of the rows `ids`."""

    def requires(self, program: Program) -> None:
        """Check that the model computes in float32, as the kernels do.

        Raises:
            UnsupportedError: it computes in float64, for which there is no kernel.
            PreconditionError: it computes in half precision, and was not widened.
        """
        require_float32(program, self.kernel)

    def call(self, program: Program) -> PassResult:
        """Legalize."""
        graph = program.copy_graph()
        rows = {site.name: site for site in program.plan}
        tensors = program.tensors()
        layers = {n: rows[_site_name(n)] for n in graph.nodes if n.target in _ON_CODES}
        weights = {_path(node): (node, site) for node, site in layers.items()}
        changes, lowered = [], dict[str, dict[str, str]]()
        scales: dict[str, str] = {}
        seen = Seen()
        for path, (node, site) in track(list(weights.items()), "legalize"):
            layer = _layer(node, site)
            parts = stored_parts(program, node, layer_on_codes(node))
            made = self._lower(layer, bool(site.experts), seen, *parts)
            lowered[path] = {name: f"{path}.{name}" for name in made}
            tensors |= {f"{path}.{name}": tensor for name, tensor in made.items()}
            if layer.integer_zero_point and self.shares_scale:
                lowered[path]["scale"] = scales.setdefault(site.path, f"{path}.scale")
            changes.append(Change(path, *self.describe(layer)))
        nodes = TensorNodes(graph)
        for node, site in layers.items():
            self._rewrite(graph, node, site, nodes, lowered[_path(node)])
        return PassResult(program.evolve(graph=graph, tensors=tensors), tuple(changes))

    def ensures(self, before: Program, after: Program) -> None:
        """No quantized operator is left."""
        for node in after.graph.nodes:
            if node.target in _ON_CODES:
                raise PostconditionError("a layer was not legalized", where=site_of(node))

    def _lower(self, layer: Layer, experts: bool, seen: Seen, *parts: Tensor) -> dict[str, Tensor]:
        """`lower_weight` of a layer's codes, scale and offset, now or later."""
        lower = (
            self._lower_experts
            if experts
            else self._lower_integer_zero
            if layer.integer_zero_point
            else None
        )
        compute = partial(lower or self.lower_weight, layer=layer)
        by_rows = self.by_rows and layer.integer_zero_point
        return defer(compute, *parts, by_rows=by_rows, seen=seen, key=(layer, experts))

    def _lower_integer_zero(
        self, qweight: Tensor, scale: Tensor, offset: Tensor, layer: Layer
    ) -> dict[str, Tensor]:
        """`lower_weight` for integer zero-points, which leave no correction."""
        if not holds(has_integer_zero_points(scale, offset, layer.bits).all()):
            raise PostconditionError("a zero-point that should be an integer is not")
        made = self.lower_weight(qweight, scale, offset, layer)
        return {name: tensor for name, tensor in made.items() if name != "correction"}

    def _rewrite(
        self,
        graph: fx.Graph,
        node: fx.Node,
        site: Site,
        nodes: TensorNodes,
        names: dict[str, str],
    ) -> None:
        own, layer, experts = layer_on_codes(node), _layer(node, site), site.experts

        def stored(name: str) -> Any:
            if not experts:
                return nodes.get(names[name])
            return [nodes.get(names[f"{expert}.{name}"]) for expert in range(experts)]

        corrected = ("0.correction" if experts else "correction") in names
        parts = stored("qweight"), stored("scale"), stored("zero_point")
        lowered = Lowered(parts, stored("correction") if corrected else None)
        with graph.inserting_before(node):
            if isinstance(own, GroupEmbedding):
                y = self.emit_rows(graph, own.ids, layer, lowered)
            else:
                y = self.emit(graph, own, layer, lowered)
        move_site(node, y)
        node.replace_all_uses_with(y)
        erase_unread([node])

    def _lower_experts(
        self, qweight: Tensor, scale: Tensor, offset: Tensor, layer: Layer
    ) -> dict[str, Tensor]:
        """`lower_weight` of each expert, named `0.qweight` …, as each kernel has its own weights.

        If one expert needs a correction, all have one.
        """
        each = [
            self.lower_weight(*parts, layer) for parts in zip(qweight, scale, offset, strict=True)
        ]
        corrected = [parts["correction"] for parts in each if "correction" in parts]
        if corrected:
            each = [{"correction": corrected[0].new_zeros(corrected[0].shape)} | p for p in each]
        return {f"{e}.{name}": tensor for e, p in enumerate(each) for name, tensor in p.items()}


def require_float32(program: Program, kernel: str) -> None:
    """Check that every quantized layer computes in float32.

    Args:
        program: The program.
        kernel: Name of the target's kernel, for messages.

    Raises:
        UnsupportedError: one computes in float64, for which there is no kernel.
        PreconditionError: one computes in half precision, and was not widened.
    """
    for site in program.plan.to_quantize():
        if site.dtype == "float64":
            raise UnsupportedError(
                f"{kernel} has no float64 kernel",
                where=site.name,
                hint="capture model.float() to export",
            )
        if site.dtype != "float32":
            raise PreconditionError(
                f"the layer computes in {site.dtype}",
                where=site.name,
                hint="run widen-halves before: it computes the same weights in float32",
            )


def pad_input(graph: fx.Graph, x: fx.Node, group_size: int, width: int, wanted: bool) -> fx.Node:
    """X with its groups padded to `width`, if the stored groups are padded."""
    return PadGroups.create(graph, x, group_size, width) if wanted else x


def group_sums(graph: fx.Graph, x: fx.Node, layer: Layer, wanted: bool) -> fx.Node | None:
    """S(x), if there is a correction."""
    return GroupSum.create(graph, x, layer.group_size) if wanted else None


def add_correction(
    graph: fx.Graph, y: fx.Node, sums: fx.Node | None, correction: fx.node.Argument
) -> fx.Node:
    """Y + S(x) C, if there is a correction."""
    if sums is None:
        return y
    moved = graph.call_function(_ATEN.matmul.default, (sums, correction))
    return graph.call_function(_ATEN.add.Tensor, (y, moved))


def add_bias(graph: fx.Graph, y: fx.Node, bias: fx.node.Argument) -> fx.Node:
    """Y + b, if there is a bias."""
    return y if bias is None else graph.call_function(_ATEN.add.Tensor, (y, bias))


def _layer(node: fx.Node, site: Site) -> Layer:
    own = layer_on_codes(node)
    high = str(own.qweight.target).endswith(HIGH_CODES)  # always an integer
    return Layer(own.bits, own.group_size, site.k, site.has_integer_zero_point or high)


def _path(node: fx.Node) -> str:
    """Path of the tensors of a quantized layer."""
    return str(layer_on_codes(node).qweight.target).removesuffix(".qweight")


def _site_name(node: fx.Node) -> str:
    """The site of a layer, whose mark may be on a sum with an adapter or another plane."""
    name = site_of(node)
    if name is None:
        name = next((s for s in map(site_of, node.users) if s is not None), None)
    if name is None:
        raise PostconditionError("a quantized layer belongs to no site", where=f"node {node.name}")
    return name
