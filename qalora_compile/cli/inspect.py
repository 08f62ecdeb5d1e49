"""`inspect`: a row for each layer of a RUN, FOLDED or exported folder, and totals."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qalora_compile.api.inspect import (
    Row,
    draw,
    group_equal_rows,
    inspect_exported,
    inspect_program,
)
from qalora_compile.brief import megabytes
from qalora_compile.cli.ui import console, print_json, print_summary, print_table
from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import QUANTIZE
from qalora_compile.untrusted.artifacts import PROGRAM_FILE

NAME = "inspect"
SUMMARY = "show what was quantized, how, and why, in one row per layer"
EXAMPLES = """examples:
  qalora-compile inspect run
  qalora-compile inspect folded --group
  qalora-compile inspect edge --json
  qalora-compile inspect folded --svg layer.svg --only model.layers.0
  qalora-compile inspect run --netron run.onnx
"""
_MANY = 40
"""Number of rows above which the output suggests `--group`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", metavar="PATH", help="RUN, FOLDED, DIR or .onnx")
    parser.add_argument(
        "--group",
        action="store_true",
        help="one row for layers that differ only in numbers: layers.{0..11}.q_proj",
    )
    parser.add_argument("--json", action="store_true", help="print rows and totals as JSON")
    parser.add_argument("--text", metavar="FILE", help="write the graph as text")
    parser.add_argument("--dot", metavar="FILE", help="… as DOT, for Graphviz")
    parser.add_argument("--svg", metavar="FILE", help="… as an image")
    parser.add_argument("--netron", metavar="FILE", help="… as ONNX without weights, for Netron")
    parser.add_argument("--only", metavar="PATH", help="draw this part only; not for --text")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    path = Path(options.path)
    drawn = {name: getattr(options, name) for name in ("text", "dot", "svg", "netron")}
    files = {name: Path(file) for name, file in drawn.items() if file}
    if (path / PROGRAM_FILE).exists():
        program = Program.load(path)
        draw(program, files, options.only)
        rows, totals = inspect_program(program)
    else:
        if files:
            raise UserInputError(
                f"{path} is not a RUN or FOLDED folder, so its graph cannot be written",
                hint="an exported model can be opened in Netron directly",
            )
        rows, totals = inspect_exported(path)
    if options.group:
        rows = group_equal_rows(rows)
    if options.json:
        print_json({"layers": rows, "totals": totals})
        return 0
    _print_rows(rows, grouped=options.group)
    print_summary(str(path), totals)
    if len(rows) > _MANY and not options.group:
        console.print("--group shows similar layers in one row")
    return 0


def _print_rows(rows: list[Row], *, grouped: bool) -> None:
    """Print quantized layers, then those in float and why: two tables that fit 80 columns."""
    count = ("count",) if grouped else ()
    quantized = [row for row in rows if row["decision"] == QUANTIZE]
    kept = [row for row in rows if row["decision"] != QUANTIZE]
    if quantized:
        why = ("why",) if any(row["why"] for row in quantized) and not grouped else ()
        columns = ("path", *count, "kind", "K×N", "bits", "group", "rank", "bytes", *why)
        reasons = ", ".join(dict.fromkeys(row["reason"] for row in quantized))
        _print("quantized", f"({reasons})", columns, quantized, wrap=("path", "why"))
    if kept:
        columns = ("path", *count, "kind", "shape", "bytes", "reason")
        _print("kept in float", "", columns, kept, wrap=("path", "reason"))


def _print(
    what: str, remark: str, columns: tuple[str, ...], rows: list[Row], *, wrap: tuple[str, ...]
) -> None:
    number = sum(row.get("count", 1) for row in rows)
    if all(row.get("rank") is None for row in rows):
        columns = tuple(c for c in columns if c != "rank")
    cells = [[_cell(column, row[column]) for column in columns] for row in rows]
    print_table(f"{what}: {number} {remark}".rstrip(), columns, cells, wrap=wrap)


def _cell(column: str, value: Any) -> str:
    if column == "bytes":
        return megabytes(value) if value else "shared"
    return "" if value is None else str(value)
