"""What a model is, at a glance: kind, size, bits, target, and how it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qalora_compile.api.edge import read_edge_record
from qalora_compile.api.inspect import Row
from qalora_compile.api.run_folder import RUN_FILE, read_run_file
from qalora_compile.brief import megabytes
from qalora_compile.ir.site_plan import QUANTIZE
from qalora_compile.ir.stages import ADAPTED, FOLDED

_KINDS = {ADAPTED: "program with adapters that are not folded", FOLDED: "folded program"}


def overview(path: Path, rows: Sequence[Row], totals: Mapping[str, Any]) -> dict[str, object]:
    """Rows of a summary, the most important first; what is not known is left out.

    Args:
        path: A program folder, an edge folder or an exported file.
        rows: Its layers, grouped or not.
        totals: Their totals.

    Raises:
        UserInputError: the record of the folder is damaged.
    """
    quantized = [row for row in rows if row["decision"] == QUANTIZE]
    kept = [row for row in rows if row["decision"] != QUANTIZE]
    stage, target = str(totals["stage"]), totals.get("target")
    found = {
        "what": f"model for {target}" if target else _KINDS.get(stage, f"{stage} program"),
        "size": totals["size"],
        "quantized layers": _widths(quantized) or "none",
        "zero-points": totals.get("zero-points"),
        "in float": _in_float(kept),
        "adapters": _ranks(quantized),
        "in both files": totals.get("in both files"),
        **_origin(_record(path)),
        "passes": _without_parameters(str(totals["passes"])),
        "notes": totals.get("notes"),
    }
    return {name: value for name, value in found.items() if value}


def _record(path: Path) -> dict[str, Any]:
    """`run.json` or `qalora.json`; empty if there is none."""
    if (path / RUN_FILE).is_file():
        return read_run_file(path)
    return read_edge_record(path) if path.is_dir() else {}


def _widths(rows: Sequence[Row]) -> str:
    counts: Counter[str] = Counter()
    for row in rows:
        counts[f"{row['bits']} bits in groups of {row['group']}"] += row.get("count", 1)
    return ", ".join(f"{count} of {width}" for width, count in counts.most_common())


def _in_float(rows: Sequence[Row]) -> str:
    count = sum(row.get("count", 1) for row in rows)
    return f"{count} weights, {megabytes(sum(row['bytes'] for row in rows))}" if count else ""


def _ranks(rows: Sequence[Row]) -> str:
    ranks = sorted({row["rank"] for row in rows if row["rank"] is not None})
    return f"rank {', '.join(map(str, ranks))}" if ranks else ""


def _origin(record: Mapping[str, Any]) -> dict[str, object]:
    """Base model, training data and versions, from a record."""
    data, fit = record.get("data") or [], record.get("fit") or {}
    quant, versions = record.get("quant") or {}, record.get("versions") or {}
    examples = record.get("examples") or (record.get("data_figures") or {}).get("examples")
    trained = f"{examples} examples, {fit['steps']} steps" if fit else ""
    return {
        "base model": record.get("model"),
        "quantized by": quant.get("method"),
        "trained on": ", ".join(map(str, data)),
        "training": trained,
        "status": record.get("status"),
        "made by": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _without_parameters(passes: str) -> str:
    """The names of the passes; their parameters may list every layer."""
    names, depth = "", 0
    for character in passes:
        depth += (character == "{") - (character == "}")
        names += character if depth == 0 and character != "}" else ""
    return names
