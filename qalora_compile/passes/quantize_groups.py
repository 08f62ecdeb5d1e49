"""quantize-groups: replace planned weights by packed codes with a scale and offset per group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from qalora_compile.config import QuantSpec
from qalora_compile.errors import PostconditionError, UserInputError
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.pattern import get_tensor, match_linear
from qalora_compile.ir.plan import Site
from qalora_compile.ir.program import ANNOTATED, QUANTIZED, Program
from qalora_compile.ir.spec import GROUP_LINEAR
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
    once and its tensors are shared.
    Leaves alone: every other node. All remaining parameters stop requiring gradients.
    Exactness: lossy; the program computes the model with its weights replaced by
    `scale · q + offset` (arXiv 2309.14717, Eq. 1).

    Options: the fields of `QuantSpec`.
    """

    name: ClassVar[str] = "quantize-groups"
    consumes: ClassVar[tuple[str, ...]] = (ANNOTATED,)
    produces: ClassVar[str | None] = QUANTIZED

    def requires(self, program: Program) -> None:
        """The plan has something to quantize.

        Raises:
            UserInputError: it has not.
        """
        if not program.plan.to_quantize():
            kept = "; ".join(f"{s.name}: {s.reason}" for s in program.plan if s.n)
            raise UserInputError(
                "there is no linear layer to quantize",
                where=kept or "the model has no linear map by a parameter",
                hint="name sites in targets, or check that the model is the one you meant",
            )

    def call(self, program: Program) -> PassResult:
        """Quantize and rewrite."""
        graph = program.copy_graph()
        tensors = {name: _freeze(t) for name, t in program.tensors().items()}
        tensors = _keep_ties(program.tensors(), tensors)
        weights = program.plan.weights_to_quantize()
        owners = {site.storage: site.path for site in weights}
        changes = []
        for site in track(weights, "quantize"):
            tensors |= self._quantize(site, program)
            changes.append(Change(site.path, f"{site.k}×{site.n} to {self.bits} bits", self.method))
        rows = {site.name: site for site in program.plan.to_quantize()}
        nodes = TensorNodes(graph)
        for node in list(graph.nodes):
            site_row = rows.get(site_of(node) or "")
            linear = match_linear(node) if site_row is not None else None
            if site_row is None or linear is None:
                continue
            path = owners[site_row.storage]
            with graph.inserting_before(node):
                parts = [nodes.get(f"{path}.{part}") for part in ("qweight", "scale", "offset")]
                new = graph.call_function(
                    GROUP_LINEAR, (linear.x, *parts, linear.bias, self.bits, self.group_size)
                )
            move_site(node, new)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        graph.eliminate_dead_code()
        plan = program.plan.update(
            {
                name: {
                    "bits": self.bits,
                    "group_size": self.group_size,
                    "path": owners[row.storage],
                }
                for name, row in rows.items()
            }
        )
        return PassResult(
            program.evolve(graph=graph, tensors=tensors, plan=plan),
            tuple(changes),
            tuple(Change(s.name, "kept in float", s.reason) for s in plan if s.bits is None),
        )

    def ensures(self, before: Program, after: Program) -> None:
        """Every `quantize` row is computed by a group_linear of the options' bits and group."""
        computed = {
            site_of(n): n.args[5:7] for n in after.graph.nodes if n.target is GROUP_LINEAR
        }
        for site in after.plan.to_quantize():
            if computed.get(site.name) != (self.bits, self.group_size):
                raise PostconditionError("the site was not quantized", where=site.name)

    def _quantize(self, site: Site, program: Program) -> dict[str, Tensor]:
        weight = get_tensor(program.module, site.weight)
        assert weight is not None, "the plan was made from this module"
        matrix = weight.detach().t() if site.transposed else weight.detach()
        affine = get_quantizer(self.method)(matrix, self).validate()
        return {
            f"{site.path}.qweight": affine.pack(),
            f"{site.path}.scale": affine.scale,
            f"{site.path}.offset": affine.offset,
        }


def _freeze(tensor: Tensor) -> Tensor:
    """The same memory as a parameter that takes no gradient; the user's model is not touched."""
    if not isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _keep_ties(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names that shared one parameter object share one again."""
    first = {id(before[name]): after[name] for name in reversed(before)}
    return {name: first[id(before[name])] for name in after}


