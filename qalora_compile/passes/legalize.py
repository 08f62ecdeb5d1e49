"""What all legalize passes have in common: each layer on codes becomes its target's kernel."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from qalora_compile.errors import PostconditionError, PreconditionError, UnsupportedError
from qalora_compile.ir.deferred import Seen, defer
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.plan import Site
from qalora_compile.ir.program import ADAPTED, FOLDED, QUANTIZED, Program
from qalora_compile.ir.spec import GROUP_SUM, ON_CODES, SPREAD_GROUPS, tensor_argument
from qalora_compile.passes.base import Change, Pass, PassResult
from qalora_compile.passes.rewrite import TensorNodes
from qalora_compile.progress import track

_ATEN = torch.ops.aten


class Layer(NamedTuple):
    """What a layer on codes says about its weight."""

    bits: int
    group_size: int
    k: int


@dataclass(frozen=True)
class LegalizePass(Pass):
    """Rewrite every group_linear and expert_linear into one target's operators.

    A pass says how a weight is stored (`lower_weight`), how that is described, and which nodes
    compute the layer (`emit`).
    """

    consumes: ClassVar[tuple[str, ...]] = (QUANTIZED, ADAPTED, FOLDED)
    kernel: ClassVar[str] = ""
    """What has no float64 form, for the message."""

    @abstractmethod
    def lower_weight(
        self, qweight: Tensor, scale: Tensor, offset: Tensor, layer: Layer
    ) -> dict[str, Tensor]:
        """The stored tensors of one matrix, by the names that they get behind the site's path."""

    @abstractmethod
    def describe(self, layer: Layer) -> tuple[str, str]:
        """What a layer becomes, and what of it is stored otherwise."""

    @abstractmethod
    def emit(
        self,
        graph: fx.Graph,
        node: fx.Node,
        layer: Layer,
        stored: Callable[[str], fx.Node | list[fx.Node] | None],
    ) -> fx.Node:
        """Insert the target's nodes for `node`; `stored` gives a lowered tensor's node, or None.

        For experts it gives the nodes of all of them.
        """

    def requires(self, program: Program) -> None:
        """The model computes in float32, as the kernels do.

        Raises:
            UnsupportedError: it computes in float64, for which there is no kernel.
            PreconditionError: it computes in half precision, and was not widened.
        """
        for site in program.plan.to_quantize():
            if site.dtype == "float64":
                raise UnsupportedError(
                    f"{self.kernel} has no float64 kernel",
                    where=site.name,
                    hint="capture model.float() to export",
                )
            if site.dtype != "float32":
                raise PreconditionError(
                    f"the layer computes in {site.dtype}",
                    where=site.name,
                    hint="run widen-halves before: it computes the same weights in float32",
                )

    def call(self, program: Program) -> PassResult:
        """Legalize."""
        graph = program.copy_graph()
        rows = {site.name: site for site in program.plan}
        tensors = program.tensors()
        linears = {n: rows[_site_name(n)] for n in graph.nodes if n.target in ON_CODES}
        weights = {site.path: (node, site) for node, site in linears.items()}
        changes, lowered, seen = [], dict[str, dict[str, Tensor]](), Seen()
        for node, site in track(list(weights.values()), "legalize"):
            layer = _layer(node, site)
            qweight, scale, offset = (tensor_argument(program, node, i) for i in (1, 2, 3))
            lower = self._lower_experts if site.experts else self.lower_weight
            lowered[site.path] = defer(
                partial(lower, layer=layer), qweight, scale, offset, seen=seen, key=layer
            )
            changes.append(Change(site.path, *self.describe(layer)))
        nodes = TensorNodes(graph)
        for node, site in linears.items():
            self._rewrite(graph, node, site, nodes, lowered[site.path])
        for path, parts in lowered.items():
            tensors |= {f"{path}.{name}": tensor for name, tensor in parts.items()}
        return PassResult(program.evolve(graph=graph, tensors=tensors), tuple(changes))

    def ensures(self, before: Program, after: Program) -> None:
        """No group_linear or expert_linear is left."""
        for node in after.graph.nodes:
            if node.target in ON_CODES:
                raise PostconditionError("a layer was not legalized", where=site_of(node))

    def _rewrite(
        self,
        graph: fx.Graph,
        node: fx.Node,
        site: Site,
        nodes: TensorNodes,
        parts: dict[str, Tensor],
    ) -> None:
        def stored(name: str) -> fx.Node | list[fx.Node] | None:
            if (f"0.{name}" if site.experts else name) not in parts:
                return None
            if not site.experts:
                return nodes.get(f"{site.path}.{name}")
            return [nodes.get(f"{site.path}.{expert}.{name}") for expert in range(site.experts)]

        with graph.inserting_before(node):
            y = self.emit(graph, node, _layer(node, site), stored)
        move_site(node, y)
        node.replace_all_uses_with(y)
        erase_unread([node])

    def _lower_experts(
        self, qweight: Tensor, scale: Tensor, offset: Tensor, layer: Layer
    ) -> dict[str, Tensor]:
        """`lower_weight` of each expert, named `0.qweight` …: a kernel's weights are its own.

        Where one expert needs a correction, all have one.
        """
        each = [
            self.lower_weight(*parts, layer) for parts in zip(qweight, scale, offset, strict=True)
        ]
        corrected = [parts["correction"] for parts in each if "correction" in parts]
        if corrected:
            each = [{"correction": corrected[0].new_zeros(corrected[0].shape)} | p for p in each]
        return {f"{e}.{name}": tensor for e, p in enumerate(each) for name, tensor in p.items()}


def spread(
    graph: fx.Graph, x: fx.node.Argument, group_size: int, width: int, wanted: bool
) -> fx.node.Argument:
    """x with its groups padded to `width`, where the stored groups are."""
    return graph.call_function(SPREAD_GROUPS, (x, group_size, width)) if wanted else x


def group_sums(
    graph: fx.Graph, x: fx.node.Argument, layer: Layer, wanted: bool
) -> fx.Node | None:
    """S(x), where there is a correction."""
    return graph.call_function(GROUP_SUM, (x, layer.group_size)) if wanted else None


def add_correction(
    graph: fx.Graph, y: fx.Node, sums: fx.Node | None, correction: fx.node.Argument
) -> fx.Node:
    """y + S(x) C, where there is a correction."""
    if sums is None:
        return y
    moved = graph.call_function(_ATEN.matmul.default, (sums, correction))
    return graph.call_function(_ATEN.add.Tensor, (y, moved))


def add_bias(graph: fx.Graph, y: fx.Node, bias: fx.node.Argument) -> fx.Node:
    """y + b, where there is a bias."""
    return y if bias is None else graph.call_function(_ATEN.add.Tensor, (y, bias))


def _layer(node: fx.Node, site: Site) -> Layer:
    bits, group_size = node.args[5], node.args[6]
    assert isinstance(bits, int) and isinstance(group_size, int)
    return Layer(bits, group_size, site.k)


def _site_name(node: fx.Node) -> str:
    """Name of the site that a group_linear belongs to; an adapter may stand between them."""
    name = site_of(node)
    if name is None:
        name = next((s for s in map(site_of, node.users) if s is not None), None)
    if name is None:
        raise PostconditionError("a quantized layer belongs to no site", where=f"node {node.name}")
    return name
