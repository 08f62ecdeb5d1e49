"""`inspect`: a row for each layer of a RUN, FOLDED or exported folder, and totals."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_compile.brief import megabytes
from qalora_compile.cli.ui import console, print_json, print_summary, print_table
from qalora_compile.errors import UserInputError
from qalora_compile.files import check_output
from qalora_compile.untrusted.artifacts import PROGRAM_FILE

if TYPE_CHECKING:
    from qalora_compile.api.inspect import Row

EXAMPLES = """examples:
  # what it is, its size, bits, and how it was made
  qalora-compile inspect run
  # … and one row for similar layers
  qalora-compile inspect folded --group
  qalora-compile inspect folded --layers           … and one row per layer
  qalora-compile inspect edge --json
  qalora-compile inspect folded --html layers.html
  qalora-compile inspect folded --svg layer.svg --only model.layers.0
  qalora-compile inspect run --netron run.onnx
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", metavar="PATH", help="RUN, FOLDED, DIR, .onnx or .xml")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--group",
        action="store_true",
        help="one row for layers that differ only in numbers: layers.{0..11}.q_proj",
    )
    shown.add_argument("--layers", action="store_true", help="one row per layer")
    parser.add_argument("--html", metavar="FILE", help="write all rows and totals as an HTML page")
    parser.add_argument("--json", action="store_true", help="print all rows and totals as JSON")
    parser.add_argument("--text", metavar="FILE", help="write the graph as text")
    parser.add_argument("--dot", metavar="FILE", help="… as DOT, for Graphviz")
    parser.add_argument("--svg", metavar="FILE", help="… as an image")
    parser.add_argument("--netron", metavar="FILE", help="… as ONNX without weights, for Netron")
    parser.add_argument("--only", metavar="PATH", help="draw this part only; not for --text")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.inspect import group_equal_rows
    from qalora_compile.api.overview import overview

    path = Path(options.path)
    if options.html:
        check_output(Path(options.html), overwrite=True, inputs=[path], is_file=True)
    rows, totals = _read(path, options)
    if options.html:
        _write_page(path, rows, totals, options.html)
    if options.group:
        rows = group_equal_rows(rows)
    if options.json:
        print_json({"layers": rows, "totals": totals})
        return 0
    if options.group or options.layers:
        _print_rows(rows, grouped=options.group)
    print_summary(str(path), overview(path, rows, totals))
    if not (options.group or options.layers):
        console.print("--group and --layers list the layers")
    return 0


def _write_page(path: Path, rows: list[Row], totals: Row, file: str) -> None:
    """Write rows and totals as a page."""
    from qalora_compile.api.inspect_page import inspect_page
    from qalora_compile.api.overview import overview

    page = inspect_page(str(path), rows, overview(path, rows, totals))
    page.write(file)


def _read(path: Path, options: argparse.Namespace) -> tuple[list[Row], Row]:
    """Rows and totals; the drawings that the options name are written."""
    from qalora_compile.api.inspect import draw, inspect_exported, inspect_program
    from qalora_compile.ir.program import Program

    drawn = {name: getattr(options, name) for name in ("text", "dot", "svg", "netron")}
    files = {name: Path(file) for name, file in drawn.items() if file}
    if (path / PROGRAM_FILE).exists():
        program = Program.load(path)
        draw(program, files, options.only)
        return inspect_program(program)
    if files:
        raise UserInputError(
            f"{path} is not a RUN or FOLDED folder, so its graph cannot be written",
            hint="an exported model can be opened in Netron directly",
        )
    return inspect_exported(path)


def _print_rows(rows: list[Row], *, grouped: bool) -> None:
    """Print quantized layers, then those in float and why: two tables that fit 80 columns."""
    from qalora_compile.ir.site_plan import QUANTIZE

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
