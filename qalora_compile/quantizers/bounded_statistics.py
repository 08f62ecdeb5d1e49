"""Collects statistics of a model's layers in parts that fit a memory limit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.quantizers.calibrate import (
    as_calls,
    check_calls,
    collect_statistics,
    layer_inputs,
)
from qalora_compile.quantizers.statistics import ActivationStatistics

_MOST_BYTES = 1 << 30
"""Limit on the bytes of moments in memory; those of a single layer may exceed it."""


class StatisticsInParts(Mapping[str, ActivationStatistics]):
    """`collect_statistics` of all layers, by path, without holding all of them in memory.

    The layers are divided, in graph order, into parts whose moments take at most 1 GiB together.
    Access to a layer collects its part and drops the previous one: with access in graph order, the
    model runs once for each part.

    Args:
        program: As for `collect_statistics`.
        calls: As for `collect_statistics`.

    Raises:
        UserInputError: a call does not fit; on access also as for `collect_statistics`.
        PreconditionError: the program is at another stage.
    """

    def __init__(self, program: Program, calls: Iterable[Call]) -> None:
        self._program, self._calls = program, as_calls(calls)
        check_calls(program, self._calls)
        self._part_of = {path: part for part in _parts(program) for path in part}
        self._held: dict[str, ActivationStatistics] = {}

    def __getitem__(self, path: str) -> ActivationStatistics:
        part = self._part_of[path]
        if path not in self._held:
            self._held = {}  # released before the next part is collected
            self._held = collect_statistics(self._program, self._calls, part)
        return self._held[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._part_of)

    def __len__(self) -> int:
        return len(self._part_of)


def _parts(program: Program) -> list[tuple[str, ...]]:
    """The paths of layers that have statistics, in graph order, divided by the moments' bytes."""
    widths = {site.path: site.k for site in program.plan.to_quantize()}
    parts: list[tuple[str, ...]] = []
    held: set[object] = set()
    size = 0
    for path, inputs in layer_inputs(program).items():
        cost = 8 * widths[path] ** 2
        new = inputs not in held  # layers that read one tensor share a moment
        if not parts or (new and size + cost > _MOST_BYTES):
            parts.append(())
            held, size, new = set(), 0, True
        parts[-1] = (*parts[-1], path)
        size += cost if new else 0
        held.add(inputs)
    return parts
