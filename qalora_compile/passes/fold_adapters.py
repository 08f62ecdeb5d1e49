"""fold-adapters: absorb trained adapters into the offsets, exactly and without a remainder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qalora_compile.errors import PostconditionError, PreconditionError
from qalora_compile.ir.adapters.base import Adapter
from qalora_compile.ir.adapters.find import find_adapters
from qalora_compile.ir.lazy_tensor import defer, is_lazy
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.linear import GroupSum
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import ON_CODES, layer_on_codes
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

    Dropout before an adapter only acts in training and is removed with it. Adapters that keep
    zero-points integers are folded into the scales and offsets that they compute with:

    Before:  %1 = qalora.integer_zero_linear(%x, @fc.qweight, @fc.scale, @fc.offset, …, integer)
    After:   %1 = qalora.group_linear(%x, @fc.qweight, @fc.scale', @fc.offset', …)

    An `affine_linear` is folded likewise, into scale, offset and, where codes trained, codes.

    Fires on: every integer_zero_linear and affine_linear; every pooled_adapter added to a
    group_linear of the same input, and every expert_adapter added to an expert_linear.
    Leaves alone: nothing; an adapter that does not fold is an error. Heads that trained with the
    adapters (`Program.trained`) are frozen again.
    Exactness: exact in real arithmetic, since the update is constant inside each group; computed
    in float64 and stored in the dtype of the offset. Codes and scales change only where an adapter
    of kind `scale`, `affine` or `qat` trained them. What one operator computes with its adapter is
    folded bit for bit.
    """

    name: ClassVar[str] = "fold-adapters"
    consumes: ClassVar[tuple[str, ...]] = (ADAPTED,)
    produces: ClassVar[str | None] = FOLDED

    def requires(self, program: Program) -> None:
        """Check that all adapters are finite and fold.

        Raises:
            PreconditionError: one does not, or pools groups that do not fit.
        """
        for name, parameter in program.named_adapter_parameters():
            if not is_finite(parameter):
                raise PreconditionError(
                    "an adapter holds NaN or infinite values",
                    where=name,
                    hint="training diverged: lower the learning rate, or go back to a checkpoint",
                )
        adapters = find_adapters(program.graph)
        adapted = {adapter.layer_node for adapter in adapters}
        offsets = {adapter.names["offset"] for adapter in adapters}
        for node in program.graph.nodes:
            quantized = node.target in ON_CODES
            shares = quantized and str(layer_on_codes(node).offset.target) in offsets
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
        folded: dict[str, tuple[object, ...]] = {}
        changes = []
        for adapter in track(find_adapters(graph), "fold"):
            names, own = adapter.names, adapter.settings
            trained = tuple(names[part] for part in adapter.trains)
            key = (trained, own.scaling, own.pool, adapter.moves)
            if names["offset"] not in folded:
                folded[names["offset"]] = key
                moved = _fold(adapter, names, tensors)
                changes.append(Change(adapter.site or names["offset"], moved))
            elif folded[names["offset"]] != key:
                raise PreconditionError(
                    "one weight carries two different adapters", where=adapter.site
                )
            adapter.remove(graph)
        plan = program.plan.update(
            {site.name: {"rank": None, "why_rank": ""} for site in program.plan}
        )
        tensors = freeze(tensors, program.trained)
        after = program.evolve(graph=graph, tensors=tensors, plan=plan, trained=())
        return PassResult(after, tuple(changes))

    def ensures(self, before: Program, after: Program) -> None:
        """No adapter is left, and codes and scales are those from before where none trained."""
        left = [a.node for a in find_adapters(after.graph)]
        for node in (*left, *(node for node, _ in GroupSum.all_in(after.graph))):
            raise PostconditionError("an adapter node is left", where=f"node {node.name}")
        old, new = before.tensors(), after.tensors()
        moved = {a.names[part] for a in find_adapters(before.graph) for part in a.moves}
        for name, tensor in new.items():
            fixed = name.endswith((".qweight", ".scale")) and name not in moved
            if fixed and tensor is not old.get(name):
                raise PostconditionError("folding changed codes or a scale", where=name)
            if name.endswith(".offset") and not is_finite(tensor):
                raise PostconditionError("a folded offset is not finite", where=name)


def _fold(adapter: Adapter, names: Mapping[str, str], tensors: dict[str, Tensor]) -> str:
    """Fold an adapter into the tensors of its layer; return what moved, and how far."""
    made = defer(adapter.fold, *(tensors[names[part]] for part in adapter.reads))
    first = adapter.moves[0]
    moved = _distance(tensors[names[first]], made[first])
    tensors |= {names[part]: made[part] for part in adapter.moves}
    return f"{first} moved{moved}"


def _distance(before: Tensor, after: Tensor) -> str:
    """How far an offset moved at most, if it is known."""
    if is_lazy(before):
        return ""
    return f" by up to {float((after - before).abs().max()):.3g}"
