"""fold-adapters: absorb trained adapters into the offsets; exact, and no adapter is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.errors import PostconditionError, PreconditionError
from qalora_compile.ir.affine import expand_groups
from qalora_compile.ir.lazy_tensor import defer, is_lazy
from qalora_compile.ir.meta import move_site, site_of
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.ops.integer_zero_linear import SCALE, integer_zero_parameters
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import (
    ADAPTERS,
    EXPERT_ADAPTER,
    EXPERT_LINEAR,
    GROUP_LINEAR,
    GROUP_SUM,
    INTEGER_ZERO_LINEAR,
    ON_CODES,
    pooled_input,
    tensor_argument,
)
from qalora_compile.ir.stages import ADAPTED, FOLDED
from qalora_compile.ir.tensor_identity import is_finite
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.rewrite import freeze
from qalora_compile.progress import track


@dataclass(frozen=True, kw_only=True)
class FoldAdapters(Pass):
    """Absorb each adapter: offset' = offset + scaling · f · (B A), group by group.

    In zero-point form `zero_point' = zero_point − scaling · f · (B A) / scale` (arXiv 2309.14717,
    Algorithm 1).

    Before:  %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset, …)
             %2 = qalora.group_sum(%x, 32)
             %3 = qalora.pooled_adapter(%2, @fc.lora_A, @fc.lora_B, 2.0)
             %4 = aten.add.Tensor(%1, %3)
    After:   %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale, @fc.offset', …)

    Dropout before an adapter is for training alone, and goes with it. Adapters that keep
    zero-points whole are folded into what they compute with:

    Before:  %1 = qalora.integer_zero_linear(%x, @fc.qweight, @fc.scale, @fc.offset, …, integer)
    After:   %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale', @fc.offset', …)

    Fires on: every integer_zero_linear; every pooled_adapter added to a group_linear of the same
    input, and every expert_adapter added to an expert_linear, expert by expert.
    Leaves alone: nothing; an adapter that does not fold is an error.
    Heads that trained beside the adapters (`Program.trained`) take no gradient any more.
    Exactness: exact in real arithmetic, since the update is constant inside each group; computed
    in float64 and stored in the dtype of the offset. Codes do not change, and scales only where an
    adapter of kind `scale` trained them. A integer_zero_linear is folded to the last bit.
    """

    name: ClassVar[str] = "fold-adapters"
    consumes: ClassVar[tuple[str, ...]] = (ADAPTED,)
    produces: ClassVar[str | None] = FOLDED

    def requires(self, program: Program) -> None:
        """Adapters are finite and each stands in a form that folds.

        Raises:
            PreconditionError: one is not, or pools groups that do not fit.
        """
        for name, parameter in program.named_adapter_parameters():
            if not is_finite(parameter):
                raise PreconditionError(
                    "an adapter holds NaN or infinite values",
                    where=name,
                    hint="training diverged: lower the learning rate, or go back to a checkpoint",
                )
        adapted = {
            match_adapter(node).base for node in program.graph.nodes if node.target in ADAPTERS
        }
        adapted |= {node for node in program.graph.nodes if node.target is INTEGER_ZERO_LINEAR}
        offsets = {str(base.args[3]) for base in adapted}
        for node in program.graph.nodes:
            shares = node.target in ON_CODES and str(node.args[3]) in offsets
            if shares and node not in adapted:
                raise PreconditionError(
                    "one use of a shared weight has an adapter and another has none",
                    where=site_of(node),
                    hint="folding for one use would change the other: give both the adapter",
                )

    def call(self, program: Program) -> PassResult:
        """Fold and remove."""
        graph = program.copy_graph()
        tensors = program.tensors()
        adapters = [match_adapter(n) for n in graph.nodes if n.target in ADAPTERS]
        folded: dict[str, tuple[object, ...]] = {}
        changes = _fold_integer_zero(program, graph, tensors, folded)
        for adapter in track(adapters, "fold"):
            target = str(adapter.base.args[3].target)  # type: ignore[union-attr]
            key = (
                *map(str, adapter.update.args[1:3]),
                adapter.update.args[-1],
                adapter.pooled.args[1],
            )
            if target not in folded:
                before = tensors[target]
                tensors[target] = _fold(program, adapter, before)
                folded[target] = key
                moved = _distance(before, tensors[target])
                changes.append(Change(site_of(adapter.total) or target, f"offset moved{moved}"))
            elif folded[target] != key:
                raise PreconditionError(
                    "one weight carries two different adapters", where=site_of(adapter.total)
                )
            move_site(adapter.total, adapter.base)
            adapter.total.replace_all_uses_with(adapter.base)
            erase_unread([adapter.total])
        plan = program.plan.update(
            {site.name: {"rank": None, "why_rank": ""} for site in program.plan}
        )
        tensors = freeze(tensors, program.trained)
        after = program.evolve(graph=graph, tensors=tensors, plan=plan, trained=())
        return PassResult(after, tuple(changes))

    def ensures(self, before: Program, after: Program) -> None:
        """No adapter is left, and codes and scales are the tensors of before."""
        for node in after.graph.nodes:
            if node.target in ADAPTERS or node.target in (GROUP_SUM, INTEGER_ZERO_LINEAR):
                raise PostconditionError("an adapter node is left", where=f"node {node.name}")
        old, new = before.tensors(), after.tensors()
        trained = {n.args[2].target for n in before.graph.nodes if _trains_scale(n)}
        for name, tensor in new.items():
            fixed = name.endswith(".qweight") or (name.endswith(".scale") and name not in trained)
            if fixed and tensor is not old.get(name):
                raise PostconditionError("folding changed codes or a scale", where=name)
            if name.endswith(".offset") and not is_finite(tensor):
                raise PostconditionError("a folded offset is not finite", where=name)


def _trains_scale(node: fx.Node) -> bool:
    return node.target is INTEGER_ZERO_LINEAR and node.args[-1] == SCALE


@dataclass(frozen=True)
class Adapter:
    """An adapter in the graph: `total = base + update`, `update = pooled_adapter(pooled, …)`.

    Between `pooled` and `update` may be a dropout.
    """

    base: fx.Node
    pooled: fx.Node
    update: fx.Node
    total: fx.Node


def match_adapter(update: fx.Node) -> Adapter:
    """The foldable form around a pooled_adapter node.

    Raises:
        PreconditionError: the graph around it has another form, or pools another tensor or group.
    """
    pooled, users = pooled_input(update), list(update.users)
    form = pooled is not None and pooled.target is GROUP_SUM and len(users) == 1
    if not form or users[0].target is not torch.ops.aten.add.Tensor or users[0].kwargs:
        raise PreconditionError(
            "the adapter is not simply added to its layer", where=f"node {update.name}"
        )
    total = users[0]
    base = total.args[0] if total.args[1] is update else total.args[1]
    assert pooled is not None
    if not isinstance(base, fx.Node) or base.target not in ON_CODES or len(base.users) != 1:
        raise PreconditionError(
            "the adapter is added to no quantized layer", where=f"node {update.name}"
        )
    if base.args[0] is not pooled.args[0]:
        raise PreconditionError(
            "the adapter pools another tensor than its layer reads", where=site_of(total)
        )
    experts = base.target is EXPERT_LINEAR
    if experts != (update.target is EXPERT_ADAPTER) or (
        experts and update.args[3] is not base.args[4]
    ):
        raise PreconditionError(
            "adapter and layer give the rows to experts in different ways", where=site_of(total)
        )
    pool, group = pooled.args[1], base.args[6]
    assert isinstance(pool, int) and isinstance(group, int)
    if pool % group:
        raise PreconditionError(
            f"the adapter pools groups of {pool}, the weight is quantized in groups of {group}: "
            "it does not fold",
            where=site_of(total),
            hint=f"train with an adapter group_size that is a multiple of {group}",
        )
    return Adapter(base, pooled, update, total)


def _fold(program: Program, adapter: Adapter, offset: Tensor) -> Tensor:
    """The folded offset."""
    lora_a, lora_b = (tensor_argument(program, adapter.update, i) for i in (1, 2))
    scaling, pool, group = (
        adapter.update.args[-1],
        adapter.pooled.args[1],
        adapter.base.args[6],
    )
    assert isinstance(scaling, float) and isinstance(pool, int) and isinstance(group, int)

    def compute(offset: Tensor, lora_a: Tensor, lora_b: Tensor) -> dict[str, Tensor]:
        update = scaling * (lora_b.detach().double() @ lora_a.detach().double())
        delta = expand_groups(update, pool // group, offset.shape[-1])
        return {"offset": (offset.double() + delta).to(offset.dtype)}

    return defer(compute, offset, lora_a, lora_b)["offset"]


def _fold_integer_zero(
    program: Program,
    graph: fx.Graph,
    tensors: dict[str, Tensor],
    folded: dict[str, tuple[object, ...]],
) -> list[Change]:
    """Turn every integer_zero_linear into a group_linear, and store what it computed with."""
    changes = []
    for node in [node for node in graph.nodes if node.target is INTEGER_ZERO_LINEAR]:
        names = [str(node.args[i].target) for i in (2, 3, 7, 8)]
        key = (*names, *node.args[9:])
        if names[1] not in folded:
            folded[names[1]] = key
            before = [tensors[name] for name in names[:2]]
            made = _integer_zero_parameters(node, [tensors[name] for name in names])
            tensors |= zip(names[:2], made, strict=True)
            part = 0 if _trains_scale(node) else 1
            moved = _distance(before[part], made[part])
            changes.append(Change(site_of(node) or names[1], f"{_PARTS[part]} moved{moved}"))
        elif folded[names[1]] != key:
            raise PreconditionError(
                "one weight carries two different adapters", where=site_of(node)
            )
        with graph.inserting_before(node):
            plain = graph.call_function(GROUP_LINEAR, node.args[:7])
        move_site(node, plain)
        node.replace_all_uses_with(plain)
        erase_unread([node])
    return changes


_PARTS = ("scale", "offset")


def _integer_zero_parameters(node: fx.Node, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and offset of a integer_zero_linear, as its forward computes them."""
    bits, scaling, kind = node.args[5], *node.args[9:]
    assert isinstance(bits, int) and isinstance(scaling, float) and isinstance(kind, str)

    def compute(scale: Tensor, offset: Tensor, lora_a: Tensor, lora_b: Tensor) -> dict[str, Tensor]:
        lora = lora_a.detach(), lora_b.detach()
        made = integer_zero_parameters(scale, offset, *lora, bits, scaling, kind)
        return dict(zip(_PARTS, made, strict=True))

    made = defer(compute, *stored)
    scale = made["scale"] if kind == SCALE else stored[0]
    return scale, made["offset"]


def _distance(before: Tensor, after: Tensor) -> str:
    """How far an offset moved at most, where it is known."""
    if is_lazy(before):
        return ""
    return f" by up to {float((after - before).abs().max()):.3g}"
