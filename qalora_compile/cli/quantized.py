"""What `finetune` and `quantize` share: options of quantization, and the table of what it lost."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from qalora_compile.capture.source import Source
from qalora_compile.cli.alike import pattern_of, ranges_of
from qalora_compile.cli.ui import print_table
from qalora_compile.config import AUTO, BUDGET_UNITS, METHODS, SUPPORTED_BITS, QuantSpec
from qalora_compile.ir.stored import StoredWeight
from qalora_compile.quantizers.report import QuantReport

_COLUMNS = (
    "layers", "count", "method", "bits", "group", "weights dB", "outputs dB", "worst", "s", "notes",
)  # fmt: skip
_NUMBER = re.compile(r"\d+(\.\d+)?")


def number_or_auto(text: str) -> int | str:
    """A whole number, or `auto`."""
    return text if text == AUTO else int(text)


def add_quant_arguments(group: argparse._ActionsContainer, *, auto: bool = False) -> None:
    """Declare bits, group size, method and patterns; with `auto` also bits within a budget."""
    widths = (*SUPPORTED_BITS, AUTO) if auto else SUPPORTED_BITS
    group.add_argument("--bits", type=number_or_auto, default=4, choices=widths)
    if auto:
        group.add_argument("--budget", type=float, metavar="X", help="of --bits auto")
        group.add_argument("--budget-unit", default="bits", choices=BUDGET_UNITS)
    group.add_argument("--group-size", type=int, default=32, metavar="G")
    group.add_argument(
        "--method", default="minmax", choices=METHODS, help="how codes are chosen; the last is best"
    )
    group.add_argument("--targets", nargs="+", metavar="PATTERN", help="layers to quantize")
    group.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="to keep")


def add_stored_arguments(group: argparse._ActionsContainer) -> None:
    """Declare what is done with a base that is quantized already."""
    group.add_argument(
        "--requantize",
        action="store_true",
        help="quantize a GPTQ or AWQ checkpoint anew; without, its codes are taken as they are",
    )
    group.add_argument(
        "--zero-points", choices=("v1", "v2"), help="of a GPTQ checkpoint, against its own tag"
    )


def stored_of(options: argparse.Namespace, source: Source) -> Mapping[str, StoredWeight]:
    """The weights of a checkpoint that are quantized already, and stay as they are."""
    return {} if options.requantize else source.stored


def quant_spec(options: argparse.Namespace, **more: Any) -> QuantSpec:
    """The specification that the options ask for, and what only one command has."""
    return QuantSpec(
        bits=options.bits, group_size=options.group_size, method=options.method, **more
    )


def print_reports(reports: Sequence[QuantReport]) -> None:
    """A table of signal to noise, one row for layers that differ in the numbers of their paths."""
    alike: dict[tuple[object, ...], list[QuantReport]] = defaultdict(list)
    for report in reports:
        notes = tuple(_NUMBER.sub("#", note) for note in report.notes)
        alike[(pattern_of(report.path), report.method, report.bits, notes)].append(report)
    print_table(
        "quantization: signal to noise, higher is better",
        _COLUMNS,
        [_row(same) for same in alike.values()],
        wrap=("layers", "notes"),
    )


def _row(same: Sequence[QuantReport]) -> tuple[object, ...]:
    """Means of layers that are alike, the lowest of their outputs, and the time of all."""
    first = same[0]
    outputs = [r.output_sqnr_db for r in same if r.output_sqnr_db is not None]
    return (
        ranges_of(list(dict.fromkeys(r.path for r in same))),
        len(same),
        first.method,
        first.bits,
        first.group_size,
        _decibels(sum(r.weight_sqnr_db for r in same) / len(same)),
        _decibels(sum(outputs) / len(outputs)) if outputs else "not measured",
        _decibels(min(outputs)) if outputs else "",
        f"{sum(r.seconds for r in same):.1f}",
        _remark(same),
    )


def _remark(same: Sequence[QuantReport]) -> str:
    """The notes of the first, which stand for notes with other numbers."""
    text = "; ".join(same[0].notes)
    return text if len({r.notes for r in same}) == 1 else f"e.g. {text}"


def _decibels(value: float) -> str:
    return "exact" if value == float("inf") else f"{value:.1f}"
