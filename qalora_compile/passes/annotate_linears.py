"""annotate-linears: decide, for every weight, whether it is quantized, and say why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx, nn

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import mark_site, module_path
from qalora_compile.ir.pattern import LinearMap, get_tensor, match_linear, resolve_weight
from qalora_compile.ir.plan import KEEP, QUANTIZE, Site, SitePlan
from qalora_compile.ir.program import ANNOTATED, FLOAT, Program
from qalora_compile.ir.signature import dtype_name
from qalora_compile.ir.storage import is_finite, storage_key
from qalora_compile.passes.base import Change, Pass, PassResult
from qalora_compile.passes.select import ALL_LINEAR, as_patterns, match_patterns


@dataclass(frozen=True, kw_only=True)
class AnnotateLinears(Pass):
    """Find the uses of every parameter with two or more dimensions and write the site plan.

    Before:  %1 = aten.linear(%x, @fc.weight, @fc.bias)
    After:   the same; the plan holds a row `fc … quantize`, and %1 is marked with the site's name.

    Fires on: linear, addmm, mm and matmul by a parameter, also through transposes.
    Leaves alone (a `keep` row with a reason): excluded or untargeted sites, weights that are also
    read in another way (an embedding tied to the head), weights of other operators.
    Exactness: the graph's function does not change.

    Options:
        targets: `all-linear`, or names, dotted suffixes, globs or `re:` patterns; naming a site
            forces it where the default would keep it.
        exclude: Patterns of sites to keep in float.
    """

    name: ClassVar[str] = "annotate-linears"
    consumes: ClassVar[tuple[str, ...]] = (FLOAT, ANNOTATED)
    produces: ClassVar[str | None] = ANNOTATED

    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.targets != ALL_LINEAR:
            object.__setattr__(self, "targets", as_patterns(self.targets, "targets"))
        object.__setattr__(self, "exclude", as_patterns(self.exclude, "exclude"))

    def requires(self, program: Program) -> None:
        """Every floating weight is finite.

        Raises:
            UserInputError: a weight holds NaN or infinite values; it is named.
        """
        for name, tensor in program.tensors().items():
            if isinstance(tensor, nn.Parameter) and not is_finite(tensor):
                raise UserInputError(
                    f"the weight {name} holds NaN or infinite values",
                    where=name,
                    hint="repair or reload the checkpoint; quantizing it would spread the damage",
                )

    def call(self, program: Program) -> PassResult:
        """Write the plan."""
        graph = program.copy_graph()
        uses = _find_uses(graph, program.module)
        rows = _name_rows(uses)
        decided = _decide(rows, self.targets, self.exclude)
        for use, site in zip(uses, decided, strict=True):
            if use.linear is not None:
                mark_site(use.node, site.name)
        after = program.evolve(graph=graph, plan=SitePlan(tuple(decided)))
        return PassResult(
            after,
            tuple(Change(s.name, s.decision, s.reason) for s in decided if s.decision == QUANTIZE),
            tuple(Change(s.name, s.decision, s.reason) for s in decided if s.decision == KEEP),
        )


@dataclass(frozen=True)
class _Use:
    """One node that reads a parameter."""

    node: fx.Node
    weight: str
    tensor: Tensor
    storage: int
    linear: LinearMap | None


def _find_uses(graph: fx.Graph, module: nn.Module) -> list[_Use]:
    """Every reader of every parameter with two or more dimensions, in graph order."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    storages: dict[tuple[object, ...], int] = {}
    uses = []
    for source in graph.nodes:
        tensor = get_tensor(module, str(source.target)) if source.op == "get_attr" else None
        if not isinstance(tensor, nn.Parameter) or tensor.dim() < 2:
            continue
        storage = storages.setdefault(storage_key(tensor), len(storages))
        for reader in _readers(source):
            linear = match_linear(reader) if tensor.is_floating_point() else None
            if linear is not None and (tensor.dim() != 2 or linear.weight.node is not source):
                linear = None
            if linear is not None and not _adds_a_vector(linear, module):
                linear = None
            uses.append(_Use(reader, str(source.target), tensor, storage, linear))
    return sorted(uses, key=lambda use: order[use.node])


def _adds_a_vector(linear: LinearMap, module: nn.Module) -> bool:
    """Whether the bias, where it is a stored tensor, has one value for each output."""
    bias = linear.bias
    stored = get_tensor(module, str(bias.target)) if bias is not None else None
    return stored is None or stored.dim() == 1


def _readers(source: fx.Node) -> list[fx.Node]:
    """Nodes that read a parameter, directly or through transposes."""
    found = []
    for user in source.users:
        through = resolve_weight(user)
        found += _readers(user) if through is not None else [user]
    return found


def _name_rows(uses: list[_Use]) -> list[Site]:
    """An undecided row for each use, with a unique name."""
    taken: dict[str, int] = {}
    rows = []
    for use in uses:
        path = owner_path(use.weight)
        shown = _shown_path(path.removesuffix(_RAW), module_path(use.node))
        taken[shown] = taken.get(shown, 0) + 1
        name = shown if taken[shown] == 1 else f"{shown}@{taken[shown]}"
        linear = use.linear
        k, n = 0, 0
        if linear is not None:
            n, k = use.tensor.shape[::-1] if linear.transposed else use.tensor.shape
        rows.append(
            Site(
                name=name,
                path=path,
                weight=use.weight,
                storage=use.storage,
                kind=linear.kind if linear is not None else _operator_name(use.node),
                k=k,
                n=n,
                dtype=dtype_name(use.tensor.dtype),
                transposed=linear is not None and linear.transposed,
                decision=KEEP,
                reason="",
            )
        )
    return rows


_RAW = "_quantized"
"""Added to the name of a weight that is no module's `weight`, so that both can exist."""


def owner_path(weight: str) -> str:
    """Module path under which a weight's quantized tensors are stored."""
    for suffix in (".weight", "_weight"):
        if weight.endswith(suffix):
            return weight.removesuffix(suffix)
    return f"{weight}{_RAW}"


def _shown_path(path: str, caller: str | None) -> str:
    """The name to show: the weight's own path, unless another module uses it as its own (a tie)."""
    if not caller or path == caller or path.startswith(f"{caller}."):
        return path
    return caller


def _operator_name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def _decide(
    rows: list[Site], targets: str | tuple[str, ...], exclude: tuple[str, ...]
) -> list[Site]:
    """Fill in decision and reason.

    Raises:
        UserInputError: a pattern of `targets` or `exclude` matches no linear site.
    """
    names = {row.name: (row.name, row.name.split("@")[0], row.path) for row in rows if row.n}
    everything = targets == ALL_LINEAR
    wanted = set(names) if everything else match_patterns(targets, names, "targets")
    barred = match_patterns(exclude, names, "exclude")
    readers: dict[int, list[Site]] = {}
    for row in rows:
        if not row.n:
            readers.setdefault(row.storage, []).append(row)
    decided = []
    first: dict[int, Site] = {}
    for row in rows:
        decision, reason = _judge(row, readers.get(row.storage, []), wanted, barred, everything)
        if decision == QUANTIZE:
            # Codes are grouped along one axis of the stored weight, so one reading of it is served.
            other = first.setdefault(row.storage, row)
            if other.transposed != row.transposed:
                decision, reason = KEEP, f"reads the weight of {other.name} the other way round"
        decided.append(_replace(row, decision, reason))
    return decided


def _judge(
    row: Site, others: list[Site], wanted: set[str], barred: set[str], everything: bool
) -> tuple[str, str]:
    if not row.n:
        return KEEP, f"read by {row.kind}, which is no linear map"
    if row.name in barred:
        return KEEP, "excluded"
    if row.name not in wanted:
        return KEEP, "not among the targets"
    if others and everything:
        other = others[0]
        return KEEP, f"tied to {other.name}, which {other.kind} reads in float; name it to force it"
    return QUANTIZE, "linear map by a parameter" if everything else "named in targets"


def _replace(row: Site, decision: str, reason: str) -> Site:
    return SitePlan((row,)).update({row.name: {"decision": decision, "reason": reason}}).sites[0]
