"""`export.json`: the record of an export, in the exported folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qalora_compile._version import __version__
from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.files import write_json

RECORD_FILE = "export.json"
FORMAT, VERSION = "qalora-export", 1


def write_record(folder: Path, report: ExportReport, spec: ExportSpec) -> None:
    """Write the record of an export into its folder."""
    write_json(folder / RECORD_FILE, export_record(report, spec))


def export_record(report: ExportReport, spec: ExportSpec) -> dict[str, Any]:
    """The report as JSON types, without the options that do not affect what is written."""
    options = {name: value for name, value in spec.to_json().items() if name != "overwrite"}
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"qalora-compile {__version__}",
        "export": options,
        "quantized_layers": report.quantized_layers,
        "capabilities": {name: str(value) for name, value in report.capabilities.items()},
        "notes": list(report.notes),
        "tensors": [dataclasses.asdict(row) for row in report.stored],
    }
