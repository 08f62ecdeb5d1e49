"""`inspect`: one row a layer of a RUN, FOLDED or exported folder, and totals."""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qalora_compile.cli.ui import console, megabytes, print_json, print_summary, print_table
from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_files, check_output
from qalora_compile.ir.onnx_metadata import OnnxLayer, read_onnx_metadata
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import QUANTIZE, Site
from qalora_compile.ir.stages import FOLDED
from qalora_compile.ir.view.netron import write_structure
from qalora_compile.ir.view.svg import to_dot, to_svg
from qalora_compile.untrusted.artifacts import DECODER_FILE, ENCODER_FILE, PROGRAM_FILE

NAME = "inspect"
SUMMARY = "show what was quantized, how, and why: one row a layer"
EXAMPLES = """examples:
  qalora-compile inspect run
  qalora-compile inspect folded --group
  qalora-compile inspect edge --json
  qalora-compile inspect folded --svg layer.svg --only model.layers.0
  qalora-compile inspect run --netron run.onnx
"""
_MANY = 40
"""Rows from which on the grouped form is pointed out."""

_LAYERS = "layers to "
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", metavar="PATH", help="RUN, FOLDED, DIR or .onnx")
    parser.add_argument(
        "--group",
        action="store_true",
        help="one row for layers that differ in their number only: layers.{0..11}.q_proj",
    )
    parser.add_argument("--json", action="store_true", help="print rows and totals as JSON")
    parser.add_argument("--text", metavar="FILE", help="write the graph as text")
    parser.add_argument("--dot", metavar="FILE", help="… as DOT, for Graphviz")
    parser.add_argument("--svg", metavar="FILE", help="… as an image")
    parser.add_argument("--netron", metavar="FILE", help="… as ONNX without weights, for Netron")
    parser.add_argument("--only", metavar="PATH", help="of these, but the text, this part alone")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    path = Path(options.path)
    drawn = {name: getattr(options, name) for name in ("text", "dot", "svg", "netron")}
    files = {name: Path(file) for name, file in drawn.items() if file}
    if (path / PROGRAM_FILE).exists():
        program = Program.load(path)
        _draw(program, files, options.only)
        rows, totals = _inspect_program(program)
    else:
        if files:
            raise UserInputError(
                f"{path} is no RUN or FOLDED folder, of which a graph can be written",
                hint="an exported model opens in Netron as it is",
            )
        rows, totals = _inspect_edge(path)
    if options.group:
        rows = group_equal_rows(rows)
    if options.json:
        print_json({"layers": rows, "totals": totals})
        return 0
    _print_rows(rows, grouped=options.group)
    print_summary(str(path), totals)
    if len(rows) > _MANY and not options.group:
        console.print("layers that are alike in one row each: --group")
    return 0


def _draw(program: Program, files: Mapping[str, Path], only: str | None) -> None:
    """Write the graph in each of the forms asked for; nothing is replaced."""
    forms: dict[str, Callable[[], str]] = {
        "text": lambda: str(program),
        "dot": lambda: to_dot(program, only),
        "svg": lambda: to_svg(program, only),
    }
    for path in files.values():
        check_output(path, overwrite=False, is_file=True)
    for name, path in files.items():
        if name == "netron":
            write_structure(program, path, only)
            continue
        text = forms[name]()
        with atomic_files(path) as scratch:
            scratch.write_text(text, "utf-8")


def _print_rows(rows: list[Row], *, grouped: bool) -> None:
    """What is quantized, then what is not and why: two tables that fit 80 columns."""
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


def _inspect_program(program: Program) -> tuple[list[Row], Row]:
    tensors = program.tensors()
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    seen: set[str] = set()
    rows = []
    for site in program.plan:
        row = _site_row(site, program.stage, sizes, seen)
        if site.weight in tensors and not site.n:
            row["shape"] = "×".join(map(str, tensors[site.weight].shape))
        rows.append(row)
    decisions = Counter(row["decision"] for row in rows)
    return rows, {
        "stage": program.stage,
        **{f"{_LAYERS}{name}": count for name, count in sorted(decisions.items())},
        **_zero_points(rows),
        "bytes of all tensors": sum(sizes.values()),
        "size": megabytes(sum(sizes.values())),
        "passes": " → ".join(program.history),
        **({"notes": "; ".join(program.notes)} if program.notes else {}),
    }


def _site_row(site: Site, stage: str, sizes: dict[str, int], seen: set[str]) -> Row:
    """A row; tensors count for the first site that reads them, which `seen` remembers."""
    own = (
        [site.weight]
        if site.bits is None
        else [f"{site.path}.{part}" for part in ("qweight", "scale", "offset", "lora_A", "lora_B")]
    )
    form = (
        "whole" if site.has_integer_zero_point else "real (folded)" if stage == FOLDED else "real"
    )
    row = {
        "path": site.name,
        "kind": site.kind,
        "weight": site.weight,
        "shape": site.shape or None,
        "K×N": site.shape or None,
        "bits": site.bits,
        "group": site.group_size,
        "zero-point": form if site.bits is not None else None,
        "rank": site.rank,
        "bytes": sum(sizes.get(name, 0) for name in own if name not in seen),
        "decision": site.decision,
        "reason": site.reason,
        "why": "; ".join(filter(None, (site.why_bits, site.why_rank))),
    }
    seen.update(own)
    return row


def _zero_points(rows: list[Row]) -> Row:
    kinds = dict.fromkeys(row["zero-point"] for row in rows if row["zero-point"])
    return {"zero-points": ", ".join(kinds)} if kinds else {}


def _inspect_edge(path: Path) -> tuple[list[Row], Row]:
    """The rows of an exported model; of two graphs, those of the encoder come first."""
    if not (path / ENCODER_FILE).is_file():
        return _inspect_onnx(path / "model.onnx" if path.is_dir() else path)
    parts = {file: _inspect_onnx(path / file) for file in (ENCODER_FILE, DECODER_FILE)}
    rows = [row | {"file": file} for file, (found, _) in parts.items() for row in found]
    totals = [totals for _, totals in parts.values()]
    read = [{row["weight"]: row["bytes"] for row in found} for found, _ in parts.values()]
    both = {name: size for name, size in read[0].items() if size and name in read[1]}
    return rows, {
        **totals[0],
        **{
            name: sum(part.get(name, 0) for part in totals)
            for name in dict.fromkeys(key for part in totals for key in part)
            if name.startswith(_LAYERS)
        },
        "size": ", ".join(f"{file}: {found['size']}" for file, (_, found) in parts.items()),
        "in both files": ", ".join(f"{n} ({megabytes(s)})" for n, s in both.items()) or "nothing",
    }


def _inspect_onnx(file: Path) -> tuple[list[Row], Row]:
    if not file.is_file():
        raise UserInputError(f"there is no file {file}", where=str(file))
    metadata = read_onnx_metadata(file)
    rows = [_onnx_row(layer, metadata.target) for layer in metadata.layers]
    decisions = Counter(row["decision"] for row in rows)
    size = sum(f.stat().st_size for f in (file, file.with_name(f"{file.name}.data")) if f.exists())
    return rows, {
        "stage": metadata.stage,
        **{f"{_LAYERS}{name}": count for name, count in sorted(decisions.items())},
        **_zero_points(rows),
        "size": megabytes(size),
        "passes": " → ".join(metadata.history),
    }


def _onnx_row(layer: OnnxLayer, target: str) -> Row:
    """A row of what a file says of a layer."""
    matrix = "×".join(str(d) for d in (layer.experts, layer.k, layer.n) if d) or None
    stored = "×".join(map(str, layer.shape or ())) or None
    quantized = layer.bits is not None
    return {
        "path": layer.site,
        "kind": layer.kind,
        "weight": layer.weight,
        "shape": matrix or stored,
        "K×N": matrix,
        "bits": layer.bits,
        "group": layer.group_size if quantized else None,
        "zero-point": "integer + correction" if quantized else None,
        "rank": None,
        "bytes": layer.bytes,
        "decision": layer.decision,
        "reason": target if quantized else layer.reason,
        "why": layer.why_bits,
    }


_NUMBER = re.compile(r"(?<![^.@])\d+(?![^.@])")
"""A whole part of a dotted path: the 3 of `layers.3.fc1`, not the 1."""


_OWN = ("path", "weight", "bytes", "why")
"""Columns in which rows that are alike may differ."""


def group_equal_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for all that are alike, where the first of them stood.

    The numbers of `path` and `weight` become ranges (`layers.{0..11}.q_proj`), `bytes` the sum,
    and `count` says how many rows there were. `why`, which is of each row alone, is left out.
    """
    groups: dict[tuple[object, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        rest = tuple(pattern_of(value) for name, value in row.items() if name not in _OWN)
        groups[(pattern_of(row["path"]), *rest)].append(row)
    return [
        {
            **same[0],
            "path": ranges_of([row["path"] for row in same]),
            "weight": ranges_of([row["weight"] for row in same]),
            "bytes": sum(row["bytes"] for row in same),
            "reason": ranges_of([row["reason"] for row in same]),
            "count": len(same),
        }
        | ({"why": ""} if len(same) > 1 else {})
        for same in groups.values()
    ]


def pattern_of(value: object) -> object:
    """A text with its numbers made alike; other values as they are."""
    return _NUMBER.sub("#", value) if isinstance(value, str) else value


def ranges_of(texts: Sequence[str]) -> str:
    """Texts of one pattern as one, with the numbers that vary in braces."""
    columns = zip(*(map(int, _NUMBER.findall(text)) for text in texts), strict=True)
    shown = iter([_braces(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(shown), texts[0])


def _braces(numbers: Sequence[int]) -> str:
    """`7`, `{0..11}` or `{0..3,8}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{{{','.join(parts)}}}" if len(numbers) > 1 else str(numbers[0])
