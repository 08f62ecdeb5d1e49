"""Calibration: second moments of the inputs of planned layers, from runs of the program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.ir.interpret import WatchingInterpreter
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.linear import GroupLinear
from qalora_compile.ir.pattern import EXPERTS, match_linear
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call, split_call
from qalora_compile.ir.stages import ANNOTATED, FOLDED, QUANTIZED
from qalora_compile.progress import track
from qalora_compile.quantizers.statistics import ActivationStatistics, MomentSum

_MASK = "attention_mask"
_DECODER = "decoder_"
"""Prefix of the input names of an encoder-decoder model's decoder."""
_CALLS = "give at least one call, a tuple or a mapping of arguments, e.g. calibration=[(x,)]"


def collect_statistics(
    program: Program, calls: Iterable[Call], sites: Iterable[str] | None = None
) -> dict[str, ActivationStatistics]:
    """Run a program on calibration calls and compute the second moments of its layers' inputs.

    Runs in evaluation mode without gradients, up to the last requested layer. Rows that an
    `attention_mask` (in a decoder: a `decoder_attention_mask`) marks as padding do not count. The
    moments take `8 K²` bytes for each distinct input; if that is too much, request a few sites at a
    time.

    Args:
        program: At stage `annotated`, `quantized` or `folded`.
        calls: Arguments of each call, a tuple or a mapping, as for capture.
        sites: Paths (`Site.path`) of the layers; None takes all planned layers.

    Returns:
        Statistics by path. Uses of one weight are merged; layers that read the same tensor share
        one moment. Stacked experts have none, since the rows of an expert differ between calls.

    Raises:
        UserInputError: a path is unknown, there is no call, a call does not fit the signature, an
            input is all padding, or is NaN or infinite; the error names the site.
        PreconditionError: the program is at another stage.
    """
    inputs = layer_inputs(program)
    paths = _chosen(program, inputs, sites)
    sums: dict[tuple[fx.Node, ...], InputMoments] = {}
    for path in paths:
        sums.setdefault(inputs[path], InputMoments(path))
    wanted: dict[fx.Node, list[InputMoments]] = defaultdict(list)
    for nodes, total in sums.items():
        for x in nodes:
            wanted[x].append(total)
    with program.evaluating():
        for leaves in track(check_calls(program, calls), "calibrate"):
            _Reader(program.module, wanted, real_rows(program, leaves)).run_leaves(leaves)
    found = {nodes: total.statistics() for nodes, total in sums.items()}
    return {path: found[inputs[path]] for path in paths}


def layer_inputs(program: Program) -> dict[str, tuple[fx.Node, ...]]:
    """The nodes that each planned linear map reads as x, by path, in graph order.

    A weight that is used several times has several; stacked experts are left out.

    Raises:
        PreconditionError: the program has no such layers because it is at another stage.
    """
    if program.stage not in (ANNOTATED, QUANTIZED, FOLDED):
        raise PreconditionError(
            f"calibration takes a program at stage {ANNOTATED}, {QUANTIZED} or {FOLDED}, "
            f"this one is {program.stage}",
            hint="calibrate before adapters are inserted",
        )
    rows = {site.name: site for site in program.plan.to_quantize()}
    found: dict[str, tuple[fx.Node, ...]] = {}
    for node in program.graph.nodes:
        site = rows.get(site_of(node) or "")
        x = None if site is None or site.experts else _input_of(node)
        if site is not None and x is not None:
            found[site.path] = (*found.get(site.path, ()), x)
    return found


def _input_of(node: fx.Node) -> fx.Node | None:
    """The input x of the node of a planned layer."""
    if node.target is GroupLinear.target:
        return GroupLinear.of(node).x
    linear = match_linear(node)
    return None if linear is None or linear.kind == EXPERTS else linear.x


def _chosen(
    program: Program, inputs: Mapping[str, tuple[fx.Node, ...]], sites: Iterable[str] | None
) -> list[str]:
    """The requested paths of layers that have statistics.

    Raises:
        UserInputError: a path is not in the plan.
    """
    if sites is None:
        return list(inputs)
    wanted, planned = set(sites), {site.path for site in program.plan.to_quantize()}
    for path in sorted(wanted - planned):
        raise UserInputError(
            f"the plan quantizes no layer {path!r}", hint="name paths of rows of program.plan"
        )
    return [path for path in inputs if path in wanted]


def as_calls(calls: Iterable[Call] | None) -> tuple[Call, ...]:
    """Calls as a tuple, so that a generator is read only once.

    Raises:
        UserInputError: it is not a collection of calls, or an element is not a call.
    """
    if not isinstance(calls, Iterable) or isinstance(calls, (Tensor, Mapping, str)):
        raise UserInputError(f"calibration is {type(calls).__name__}, not calls", hint=_CALLS)
    found = tuple(calls)
    for number, call in enumerate(found):
        if not isinstance(call, (tuple, list, Mapping)):
            raise UserInputError(
                f"a calibration call is {type(call).__name__}", where=f"call {number}", hint=_CALLS
            )
    return found


def check_calls(program: Program, calls: Iterable[Call]) -> list[list[Any]]:
    """The flat inputs of each call, checked against the program's signature.

    Raises:
        UserInputError: there is no call, or one does not fit.
    """
    found = [program.leaves(*split_call(call)) for call in as_calls(calls)]
    if not found:
        raise UserInputError("there are no calibration data", hint=_CALLS)
    return found


@dataclass(frozen=True)
class RealRows:
    """Which positions of one call are not padding, `[B, T]` boolean; None without a mask.

    The decoder of an encoder-decoder model has its own positions, to which the encoder's mask does
    not apply even if both have the same length.

    Attributes:
        mask: From `attention_mask`, for all values except the decoder's.
        decoder_mask: From `decoder_attention_mask`, for the decoder's values.
        decoder: The nodes that depend on an input of the decoder.
    """

    mask: Tensor | None
    decoder_mask: Tensor | None
    decoder: frozenset[fx.Node]

    def of(self, node: fx.Node) -> Tensor | None:
        """The positions for the value of a node."""
        return self.decoder_mask if node in self.decoder else self.mask


def real_rows(program: Program, leaves: Sequence[Any]) -> RealRows:
    """Which positions are not padding, by the attention masks of a call."""
    inputs = [leaf.name.rpartition(".")[2] for leaf in program.signature.inputs]
    masks = {}
    for wanted in (_MASK, _DECODER + _MASK):
        found = [
            value
            for name, value in zip(inputs, leaves, strict=True)
            if name == wanted and isinstance(value, Tensor) and value.dim() == 2
        ]
        masks[wanted] = found[0] != 0 if len(found) == 1 else None
    placeholders = program.graph.find_nodes(op="placeholder")
    decoder: set[fx.Node] = {
        node for node, name in zip(placeholders, inputs, strict=True) if name.startswith(_DECODER)
    }
    if decoder:
        for node in program.graph.nodes:
            if not decoder.isdisjoint(node.all_input_nodes):
                decoder.add(node)
    return RealRows(masks[_MASK], masks[_DECODER + _MASK], frozenset(decoder))


class InputMoments:
    """The second moments of one layer's input; errors name its path."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._sum = MomentSum()

    def add(self, x: Tensor, keep: Tensor | None) -> None:
        """Add x, `[.., K]`, at the positions for which `keep`, `[B, T]`, is true.

        Values without these axes (pooled ones, states of another length) count completely.

        Raises:
            UserInputError: x holds NaN or infinite values.
        """
        rows = x.shape[:-1]
        fits = keep is not None and rows in (keep.shape, (keep.numel(),))
        with self._located():
            self._sum.add(x, keep if fits else None)

    def statistics(self) -> ActivationStatistics:
        """The statistics of everything added.

        Raises:
            UserInputError: all rows were padding.
        """
        with self._located():
            return self._sum.statistics()

    @contextmanager
    def _located(self) -> Iterator[None]:
        try:
            yield
        except UserInputError as error:
            error.where = self._path
            raise


class _Reader(WatchingInterpreter):
    """Accumulates the values of the wanted nodes."""

    def __init__(
        self,
        module: fx.GraphModule,
        wanted: Mapping[fx.Node, Sequence[InputMoments]],
        keep: RealRows,
    ) -> None:
        super().__init__(module, {node.name for node in wanted})
        self._wanted, self._keep = wanted, keep

    def watch(self, node: fx.Node, value: Any) -> Any:
        for total in self._wanted[node]:
            total.add(value, self._keep.of(node))
        return value
