"""sort-columns: permute columns and inputs of linear maps to make groups contiguous."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from qalora_compile.errors import PostconditionError, PreconditionError, UnsupportedError
from qalora_compile.ir.activation_order import ORDER
from qalora_compile.ir.lazy_tensor import defer, is_placeholder
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.pattern import LINEAR, LinearMap, get_tensor, match_linear
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ANNOTATED
from qalora_compile.passes.analysis.select_sites import check_paths, parse_choices
from qalora_compile.passes.framework.base import Change, Pass, PassResult, data_field
from qalora_compile.passes.framework.rewrite import TensorNodes

_ATEN = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class SortColumns(Pass):
    """Permute the columns of weights, and in the same way the inputs of the linear maps.

    Before:  %1 = aten.linear(%x, @fc.weight, @fc.bias)
    After:   %1 = aten.index_select(%x, -1, @fc.order)
             %2 = aten.linear(%1, @fc.weight, @fc.bias)        the columns of fc.weight sorted

    Checkpoints that were quantized with activation order (`desc_act`, `g_idx`) have groups of
    columns that are not contiguous. Sorted by group they are, so that an adapter folds. Weights
    that read one input in one order share the selection.

    Fires on: the rows of the weights named in `owners`.
    Leaves alone: other rows.
    Exactness: exact in real arithmetic; sums run in another order.

    Run again without the orders on a graph of placeholders (`recipes.replay`), it gives the same
    graph, for the tensors of the first run.

    Options:
        owners: `path=path` for each weight: the weight that owns its order.

    Attributes:
        orders: The orders by path of their owner, `[K]` int64: sorted column i is column
            `order[i]`. Not an option, as text cannot carry it.
    """

    name: ClassVar[str] = "sort-columns"
    consumes: ClassVar[tuple[str, ...]] = (ANNOTATED,)
    produces: ClassVar[str | None] = None

    owners: tuple[str, ...] = ()
    orders: Mapping[str, Tensor] | None = data_field(None)

    def __post_init__(self) -> None:
        parse_choices(self.owners, "owners")

    def with_orders_of(self, program: Program) -> SortColumns:
        """The pass with the orders that it stored in a program."""
        owners = set(parse_choices(self.owners, "owners").values())
        tensors = program.tensors()
        return replace(self, orders={path: tensors[f"{path}.{ORDER}"] for path in owners})

    def requires(self, program: Program) -> None:
        """Check that every path is of a plain linear layer, and that there is an order for it.

        Raises:
            UserInputError: a path is not of a weight that is quantized.
            UnsupportedError: a weight is not the parameter of one linear layer.
            PreconditionError: an order is missing, or is not a permutation.
        """
        owners = parse_choices(self.owners, "owners")
        check_paths(owners, program.plan, "owners")
        for row, linear in _linears(program, owners):
            if linear.kind != LINEAR or linear.weight.views:
                raise UnsupportedError(
                    "columns of a weight that is read through views cannot be sorted",
                    where=row,
                    hint="exclude the layer",
                )
        names = _weight_names(program)
        for path, owner in owners.items():
            weight = _weight(program, names[path])
            if self.orders is None and is_placeholder(weight):
                continue
            order = (self.orders or {}).get(owner)
            if order is None or not _is_permutation(order, weight.shape[1]):
                raise PreconditionError(
                    f"there is no order for the columns of {path}",
                    where=path,
                    hint="qc.quantize_groups(program, stored=codes) gives them",
                )

    def call(self, program: Program) -> PassResult:
        """Permute and rewrite."""
        owners = parse_choices(self.owners, "owners")
        graph, tensors = program.copy_graph(), program.tensors()
        names = _weight_names(program)
        for path, owner in owners.items():
            weight = _weight(program, names[path])
            made = _sorted(weight, (self.orders or {}).get(owner))
            tensors[names[path]] = nn.Parameter(made["weight"], requires_grad=False)
            if path == owner:
                tensors[f"{path}.{ORDER}"] = made[ORDER]
        nodes, selected = TensorNodes(graph), dict[tuple[fx.Node, str], fx.Node]()
        rows = {s.name: owners[s.path] for s in program.plan.to_quantize() if s.path in owners}
        for node in list(graph.nodes):
            if (name := site_of(node)) in rows:
                _rewrite(graph, node, rows[name], nodes, selected)
        changes = tuple(Change(path, "columns sorted by group") for path in owners)
        return PassResult(program.evolve(graph=graph, tensors=tensors), changes)

    def ensures(self, before: Program, after: Program) -> None:
        """Each linear map reads a selection."""
        owners = parse_choices(self.owners, "owners")
        for row, linear in _linears(after, owners):
            if linear.x.target is not _ATEN.index_select.default:
                raise PostconditionError("the input is not sorted", where=row)


def _sorted(weight: Tensor, order: Tensor | None) -> dict[str, Tensor]:
    """The weight with its columns in order, and the order; deferred if the weight is."""

    def compute(values: Tensor) -> dict[str, Tensor]:
        chosen = torch.arange(values.shape[1]) if order is None else order
        return {"weight": values.detach()[:, chosen].contiguous(), ORDER: chosen.clone()}

    return defer(compute, weight)


def _rewrite(
    graph: fx.Graph,
    node: fx.Node,
    owner: str,
    nodes: TensorNodes,
    selected: dict[tuple[fx.Node, str], fx.Node],
) -> None:
    linear = match_linear(node)
    assert linear is not None, "checked by `requires`"
    order = nodes.get(f"{owner}.{ORDER}")
    key = (linear.x, owner)
    if key not in selected:
        with graph.inserting_before(node):
            selected[key] = graph.call_function(_ATEN.index_select.default, (linear.x, -1, order))
    with graph.inserting_before(node):
        new = graph.call_function(
            _ATEN.linear.default, (selected[key], linear.weight.node, linear.bias)
        )
    move_site(node, new)
    node.replace_all_uses_with(new)
    erase_unread([node])


def _is_permutation(order: Tensor, k: int) -> bool:
    return torch.equal(order.sort().values, torch.arange(k))


def _weight_names(program: Program) -> dict[str, str]:
    """The parameter of each path."""
    return {site.path: site.weight for site in program.plan.weights_to_quantize()}


def _weight(program: Program, name: str) -> Tensor:
    weight = get_tensor(program.module, name)
    assert weight is not None, "the plan was made from this module"
    return weight


def _linears(program: Program, paths: Mapping[str, object]) -> list[tuple[str, LinearMap]]:
    """The linear maps of the rows of these paths, by site name."""
    rows = {site.name for site in program.plan.to_quantize() if site.path in paths}
    found = []
    for node in program.graph.nodes:
        if (name := site_of(node)) in rows:
            linear = match_linear(node)
            assert name is not None and linear is not None, "the plan was made from this graph"
            found.append((name, linear))
    return found
