"""`inspect`: one row a layer of a RUN, FOLDED or exported folder, and totals."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from qalora_compile.cli.ui import console, megabytes, print_summary, print_table
from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import ONNX_METADATA_KEY
from qalora_compile.ir.plan import Site
from qalora_compile.ir.program import FOLDED, Program
from qalora_compile.ir.storage import PROGRAM_FILE
from qalora_compile.runtime.session import open_session

NAME = "inspect"
SUMMARY = "show what was quantized, how, and why: one row a layer"
EXAMPLES = """examples:
  qalora-compile inspect run
  qalora-compile inspect edge --json
"""
_COLUMNS = ("path", "K×N", "bits", "group", "zero-point", "rank", "bytes", "decision", "reason")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", metavar="PATH", help="RUN, FOLDED, DIR or .onnx")
    parser.add_argument("--json", action="store_true", help="print rows and totals as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    path = Path(options.path)
    if (path / PROGRAM_FILE).exists():
        rows, totals = _inspect_program(Program.load(path))
    else:
        rows, totals = _inspect_onnx(path)
    if options.json:
        console.print_json(json.dumps({"layers": rows, "totals": totals}))
        return 0
    print_table(str(path), _COLUMNS, [[_cell(row[c]) for c in _COLUMNS] for row in rows])
    print_summary("totals", totals)
    return 0


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _inspect_program(program: Program) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    sizes = {name: t.numel() * t.element_size() for name, t in program.tensors().items()}
    seen: set[int] = set()
    rows = []
    for site in program.plan:
        rows.append(_site_row(site, program.stage, sizes, shared=site.storage in seen))
        seen.add(site.storage)
    decisions = Counter(row["decision"] for row in rows)
    return rows, {
        "stage": program.stage,
        **{f"layers to {name}": count for name, count in sorted(decisions.items())},
        "bytes of all tensors": sum(sizes.values()),
        "size": megabytes(sum(sizes.values())),
        "passes": " → ".join(program.history),
        **({"notes": "; ".join(program.notes)} if program.notes else {}),
    }


def _site_row(site: Site, stage: str, sizes: dict[str, int], *, shared: bool) -> dict[str, Any]:
    own = (
        [site.weight]
        if site.bits is None
        else [f"{site.path}.{part}" for part in ("qweight", "scale", "offset", "lora_A", "lora_B")]
    )
    real = "real (folded)" if stage == FOLDED else "real"
    return {
        "path": site.name,
        "K×N": site.shape or None,
        "bits": site.bits,
        "group": site.group_size,
        "zero-point": real if site.bits is not None else None,
        "rank": site.rank,
        "bytes": 0 if shared else sum(sizes.get(name, 0) for name in own),
        "decision": site.decision,
        "reason": site.reason,
    }


def _inspect_onnx(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    file = path / "model.onnx" if path.is_dir() else path
    text = open_session(file).get_modelmeta().custom_metadata_map.get(ONNX_METADATA_KEY)
    if text is None:
        raise UserInputError(f"{file.name} was not exported by this package", where=str(file))
    metadata = json.loads(text)
    rows = [
        {
            "path": layer["site"],
            "K×N": "×".join(str(layer[d]) for d in ("experts", "k", "n") if layer.get(d)),
            "bits": layer["bits"],
            "group": layer["group_size"],
            "zero-point": "integer + correction",
            "rank": None,
            "bytes": layer["bytes"],
            "decision": "quantize",
            "reason": metadata["target"],
        }
        for layer in metadata["layers"]
    ]
    size = sum(f.stat().st_size for f in (file, file.with_name(f"{file.name}.data")) if f.exists())
    return rows, {
        "stage": metadata["stage"],
        "layers to quantize": len(rows),
        "size": megabytes(size),
        "passes": " → ".join(metadata["history"]),
    }
