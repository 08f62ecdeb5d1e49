"""Table, JSON and plot of what was measured, and the part of the documentation that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.peers.bars import Panel, bars_svg
from benchmarks.peers.runner import Figures
from benchmarks.peers.variants import FLOAT, REFERENCE, Variant
from benchmarks.ratios import Spread, ratios, spread

Table = Mapping[str, Figures]
"""Figures of each variant, by name."""
COST, BROKEN = 0.1, 0.7
"""Differences of the mean loss to float32's, in nats: worth a note; not the same model."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A finished run.

    Attributes:
        machine: What it ran on, and the settings of the run.
        variants: Rows, in the order shown.
        sizes: Name → bytes of the model's files.
        tables: Number of threads → what was measured.
        skipped: Name → why a variant did not run.
    """

    machine: Mapping[str, Any]
    variants: Sequence[Variant]
    sizes: Mapping[str, int]
    tables: Mapping[int, Table]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """Skipped and failed variants, implausible ones, and remarks."""
        for name, reason in self.skipped.items():
            yield f"{name}: skipped, {reason}"
        for threads, table in self.tables.items():
            for name, found in table.items():
                if found.failed:
                    yield f"{name}, threads {threads}: failed, {found.failed}"
        yield from self._doubts()
        for variant in self.variants:
            if variant.remark and variant.name not in self.skipped:
                yield f"{variant.name}: {variant.remark}"

    def _doubts(self) -> Iterator[str]:
        """What was not compared, and what differs from float32."""
        for threads, table in self.tables.items():
            if math.isnan(_loss(table, FLOAT)):
                yield f"threads {threads}: {FLOAT} did not run, so no loss or token was compared"
        for name, apart in self.apart().items():
            if apart > COST:
                yield f"{name}: its mean loss is {apart:.2f} nats from float32's"

    def apart(self) -> dict[str, float]:
        """Name → largest difference of a variant's mean loss to float32's."""
        found: dict[str, float] = {}
        for table in self.tables.values():
            for name in table:
                difference = abs(_loss(table, name) - _loss(table, FLOAT))
                found[name] = max(found.get(name, 0.0), difference)
        return found

    def implausible(self) -> list[str]:
        """Variants whose loss is further from float32's than 4 bits explain."""
        return [name for name, apart in self.apart().items() if apart > BROKEN]

    def to_json(self) -> dict[str, Any]:
        """Everything that was measured, and the ratios of the table."""
        rows = []
        for threads, table in self.tables.items():
            best = _best(self.variants, table)
            for name, found in table.items():
                cells = {
                    label: {"tokens_per_second": asdict(speed), "ratio": _as_json(ratio)}
                    for label, (speed, ratio) in _speeds(found, table, best).items()
                }
                row = {"variant": name, "threads": threads, "bytes": self.sizes[name]}
                rows.append(row | {"speeds": cells, "measured": asdict(found)})
        return {"machine": dict(self.machine), "notes": list(self.notes()), "rows": rows}

    def markdown(self) -> str:
        """One table, its rows in blocks of the number of threads, and the notes."""
        labels = list(dict.fromkeys(_labels(self.tables)))
        head = ["", "threads", *labels, "load, s", "peak, MB", "file, MB", "perplexity", "greedy"]
        lines = [_line(head), _line(["---"] * len(head))]
        for threads, table in self.tables.items():
            best = _best(self.variants, table)
            for name, found in table.items():
                if found.failed:
                    continue
                speeds = _speeds(found, table, best)
                cells = [_cell(*speeds[label]) if label in speeds else "" for label in labels]
                lines.append(_line([name, str(threads), *cells, *self._facts(name, found, table)]))
        notes = [f"* {note}" for note in self.notes()]
        return "\n".join([*lines, *([""] if notes else []), *notes])

    def _facts(self, name: str, found: Figures, table: Table) -> list[str]:
        """Load time, memory, size, perplexity, and greedy tokens that are float32's."""
        wanted = table[FLOAT].greedy if FLOAT in table else []
        same = sum(a == b for a, b in zip(found.greedy, wanted, strict=False))
        return [
            f"{spread(found.loads).median:.2f}",
            f"{found.memory / 1e6:.0f}",
            f"{self.sizes[name] / 1e6:.0f}",
            f"{math.exp(found.loss):.2f}" if found.loss < 50 else "–",
            f"{same} of {len(wanted)}" if wanted else "–",
        ]

    def reach(self) -> Iterator[str]:
        """Our rows against the best of the reference, one line each."""
        for threads, table in self.tables.items():
            best = _best(self.variants, table)
            for variant in self.variants:
                found = table.get(variant.name)
                if variant.family == "ours" and found is not None and not found.failed:
                    cells = _speeds(found, table, best).items()
                    parts = [f"{label} {ratio}" for label, (_, ratio) in cells if ratio]
                    yield f"{variant.name}, threads {threads}: {'; '.join(parts)}"

    def svg(self, title: str) -> str:
        """Prompts and steps at the longest length of each, in tokens a second."""
        labels = list(dict.fromkeys(_labels(self.tables)))
        prompts, steps = ([x for x in labels if x.startswith(k)] for k in ("prompt", "after"))
        panels = []
        for label in (prompts[-1], steps[-1]):
            values = {
                variant.name: [_value(table, variant.name, label) for table in self.tables.values()]
                for variant in self.variants
                if any(variant.name in table for table in self.tables.values())
            }
            panels.append(Panel(f"{label}, tokens/s", values))
        return bars_svg(panels, title=title, series=[f"threads: {n}" for n in self.tables])


def _seconds(found: Figures) -> dict[str, list[float]]:
    """Column → seconds a token of each round."""
    prompts = {f"prompt {n}": [s / n for s in times] for n, times in found.prompts.items()}
    return prompts | {f"after {n}": times for n, times in found.steps.items()}


def _labels(tables: Mapping[int, Table]) -> Iterator[str]:
    for table in tables.values():
        for found in table.values():
            yield from _seconds(found)


def _best(variants: Sequence[Variant], table: Table) -> dict[str, list[float]]:
    """Column → seconds a token of the reference's fastest variant."""
    best: dict[str, list[float]] = {}
    for variant in variants:
        found = table.get(variant.name)
        if variant.family != REFERENCE or found is None or found.failed:
            continue
        for label, times in _seconds(found).items():
            if label not in best or spread(times).median < spread(best[label]).median:
                best[label] = times
    return best


def _speeds(
    found: Figures, table: Table, best: Mapping[str, list[float]]
) -> dict[str, tuple[Spread, Spread | None]]:
    """Column → tokens a second, and how many times the reference's speed, round by round."""
    return {
        label: (
            spread([1 / t for t in times]),
            ratios(best[label], times) if label in best else None,
        )
        for label, times in _seconds(found).items()
    }


def _loss(table: Table, name: str) -> float:
    return table[name].loss if name in table else float("nan")


def _value(table: Table, name: str, label: str) -> float | None:
    times = _seconds(table[name]).get(label) if name in table else None
    return 1 / spread(times).median if times else None


def _cell(speed: Spread, ratio: Spread | None) -> str:
    return f"{speed.median:.4g}" if ratio is None else f"{speed.median:.4g}, {ratio}"


def _as_json(ratio: Spread | None) -> dict[str, float] | None:
    return None if ratio is None else asdict(ratio)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def put_into(page: str, key: str, text: str) -> str:
    """The page with what stands between the marks of `key` replaced.

    Raises:
        ValueError: the page has no such marks.
    """
    start, end = f"<!-- written by benchmarks.peers: {key} -->", f"<!-- end of {key} -->"
    before, found, rest = page.partition(start)
    _, last, after = rest.partition(end)
    if not (found and last):
        raise ValueError(f"the page has no marks {start} and {end}")
    return f"{before}{start}\n\n{text}\n\n{end}{after}"
