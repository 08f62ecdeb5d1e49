"""Options of quantization and the table of its errors, shared by several commands."""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qalora_compile.cli.options import spec_of
from qalora_compile.cli.ui import print_table
from qalora_compile.config import AUTO, BUDGET_UNITS, EMBEDDINGS, SUPPORTED_BITS, QuantSpec
from qalora_compile.config.choices import EMBEDDING_BITS, EMBEDDING_GROUP, STORED_ZERO_POINTS
from qalora_compile.registry import QUANTIZERS

if TYPE_CHECKING:
    from qalora_compile.api.codes import CodesSpec
    from qalora_compile.quantizers.report import QuantReport

_COLUMNS = (
    "layers", "count", "method", "bits", "group", "weights dB", "outputs dB", "worst", "s", "notes",
)  # fmt: skip
_SETTINGS = ("method", "bits", "group")
_DEFAULT = QuantSpec()
_KEPT = "without bits, group size and method, a quantized checkpoint keeps its codes"
_NUMBER = re.compile(r"\d+(\.\d+)?")


def number_or_auto(text: str) -> int | str:
    """An integer, or `auto`."""
    return text if text == AUTO else int(text)


def add_quant_arguments(group: argparse._ActionsContainer, *, auto: bool = False) -> None:
    """Declare bits, group size, method and patterns; with `auto` also a budget of bits."""
    widths = (*SUPPORTED_BITS, AUTO) if auto else SUPPORTED_BITS
    group.add_argument(
        "--bits", type=number_or_auto, choices=widths, help=f"default {_DEFAULT.bits}; {_KEPT}"
    )
    if auto:
        group.add_argument("--budget", type=float, metavar="X", help="budget of --bits auto")
        group.add_argument(
            "--budget-unit",
            default="bits",
            choices=BUDGET_UNITS,
            help="unit of --budget; bits are per quantized weight",
        )
    group.add_argument(
        "--group-size",
        type=number_or_auto if auto else int,
        metavar="G",
        help=f"default {_DEFAULT.group_size}" + (", or auto, with --bits auto" if auto else ""),
    )
    group.add_argument(
        "--method",
        choices=QUANTIZERS.names(),
        help=f"how codes are chosen, default {_DEFAULT.method}; {QUANTIZERS.builtin[-1]} is best",
    )
    if auto:
        add_stored_argument(group)
    group.add_argument(
        "--targets",
        nargs="+",
        metavar="PATTERN",
        help="layers to quantize (default: all linear ones)",
    )
    group.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="layers to keep")


def add_calibration_arguments(group: argparse._ActionsContainer, *, otherwise: str) -> None:
    """Declare calibration data and `learned`; `otherwise` says what happens without any."""
    group.add_argument(
        "--calibration",
        nargs="+",
        metavar="FILE",
        help=f"calibration data; of several files, examples are taken in turn; {otherwise}",
    )
    group.add_argument(
        "--calibration-samples", type=int, default=128, metavar="N", help="use the first N examples"
    )
    group.add_argument(
        "--learn-steps",
        type=int,
        metavar="N",
        help=f"most steps of --method learned, default {_DEFAULT.learn_steps}; it stops earlier "
        "when held-out texts gain no more",
    )
    group.add_argument(
        "--learn-rate",
        type=float,
        metavar="X",
        help=f"peak rate of --method learned, relative to a layer's mean scale, default "
        f"{_DEFAULT.learn_rate}",
    )


def add_stored_argument(group: argparse._ActionsContainer) -> None:
    """Declare how a quantized checkpoint is read."""
    group.add_argument(
        "--stored-zero-points",
        choices=STORED_ZERO_POINTS,
        help="how a GPTQ checkpoint stores them, if its tag is wrong or missing (default: by "
        "its tag)",
    )


def codes_of(options: argparse.Namespace) -> CodesSpec:
    """The specification of the codes.

    Raises:
        UserInputError: options conflict.
    """
    from qalora_compile.api.codes import CodesSpec

    return spec_of(CodesSpec, options)


def print_reports(reports: Sequence[QuantReport]) -> None:
    """Print signal-to-noise ratios, with one row for layers whose paths differ only in numbers."""
    from qalora_compile.api.inspect import pattern_of

    alike: dict[tuple[object, ...], list[QuantReport]] = defaultdict(list)
    for report in reports:
        notes = tuple(_NUMBER.sub("#", note) for note in report.notes)
        key = pattern_of(report.path), report.method, report.bits, report.group_size, notes
        alike[key].append(report)
    rows = [dict(zip(_COLUMNS, _row(same), strict=True)) for same in alike.values()]
    common, columns = _split_columns(rows)
    of_all = f" ({', '.join(common)})" if common else ""
    print_table(
        f"quantization: signal to noise, higher is better{of_all}",
        columns,
        [[row[column] for column in columns] for row in rows],
        wrap=("layers", "notes"),
    )


def _split_columns(rows: Sequence[Mapping[str, object]]) -> tuple[list[str], list[str]]:
    """Settings that all rows share, as text, and the columns that say more."""
    common, columns = [], []
    for column in _COLUMNS:
        values = {str(row[column]) for row in rows}
        if column in _SETTINGS and len(values) == 1:
            common.append(f"{column} {values.pop()}")
        elif values != {""}:
            columns.append(column)
    return common, columns


def _row(same: Sequence[QuantReport]) -> tuple[object, ...]:
    """The means over similar layers, the lowest value of their outputs, and their total time."""
    from qalora_compile.api.inspect import ranges_of

    first = same[0]
    outputs = [r.output_sqnr_db for r in same if r.output_sqnr_db is not None]
    return (
        ranges_of(list(dict.fromkeys(r.path for r in same))),
        len(same),
        first.method,
        first.bits,
        first.group_size,
        _mean([r.weight_sqnr_db for r in same]),
        _mean(outputs) if outputs else "not measured",
        _decibels(min(outputs)) if outputs else "",
        f"{sum(r.seconds for r in same):.1f}",
        _remark(same),
    )


def _remark(same: Sequence[QuantReport]) -> str:
    """The notes of the first layer, as an example if those of the others differ in numbers."""
    text = "; ".join(same[0].notes)
    return text if len({r.notes for r in same}) == 1 else f"e.g. {text}"


def _mean(decibels: Sequence[float]) -> str:
    """The mean of the layers that are not exact, and the number of exact ones."""
    lossy = [value for value in decibels if value != math.inf]
    if not lossy:
        return _decibels(math.inf)
    exact = f", {len(decibels) - len(lossy)} exact" if len(lossy) < len(decibels) else ""
    return _decibels(sum(lossy) / len(lossy)) + exact


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


def embedding_bits(text: str) -> int | str:
    """A number of bits, `auto` or `float`."""
    return int(text) if text.isdigit() else text


def add_embedding_choice(parser: argparse._ActionsContainer) -> None:
    """Declare how a file holds embeddings and head."""
    parser.add_argument(
        "--embeddings",
        type=embedding_bits,
        choices=EMBEDDINGS,
        help="embeddings and head that are in float: bits 8 or 4, float, or auto, the default: 8 "
        "bits in a decoder if they lose next to nothing",
    )


def add_embedding_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare the options."""
    parser.add_argument(
        "--embeddings",
        type=int,
        choices=EMBEDDING_BITS,
        metavar="BITS",
        help="bits of embeddings and head, 8 or 4, without adapters; stored once if tied (default: "
        "float)",
    )
    add_embedding_group(parser)


def add_embedding_group(parser: argparse._ActionsContainer) -> None:
    """Declare the group size of `--embeddings` with a number of bits."""
    parser.add_argument(
        "--embeddings-group-size",
        type=int,
        metavar="G",
        help=f"group size of embeddings and head (default {EMBEDDING_GROUP})",
    )
