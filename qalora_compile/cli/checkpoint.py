"""`export` to what is no ONNX model: what the format keeps, then the files."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from qalora_compile.api import export_model
from qalora_compile.cli.folders import MODEL, TOKENIZER, load_run
from qalora_compile.cli.ui import console, megabytes, print_summary, print_table, steps
from qalora_compile.config import CHECKPOINT_TARGETS, ExportSpec
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.exporters.checkpoints.registry import Format
from qalora_compile.exporters.record import write_record
from qalora_compile.exporters.targets import get_target
from qalora_compile.files import atomic_folder
from qalora_compile.runtime.footprint import peak_memory

GGUF_FILE = "model.gguf"
_FOR_ONNX = ("no_kv_cache", "last_logits", "with_library")
_SHOWN = 8


def export_checkpoint(options: argparse.Namespace, spec: ExportSpec) -> int:
    """Run `export` for a target that is a checkpoint, or of an extension.

    Raises:
        UserInputError: an option of ONNX models is given.
    """
    for option in _FOR_ONNX:
        if getattr(options, option) not in (None, False):
            raise UserInputError(
                f"--{option.replace('_', '-')} has no use with target {spec.target}",
                hint="it is for ONNX models",
            )
    started = time.monotonic()
    source, out = Path(options.folder), Path(options.out)
    kind = get_target(spec.target)
    suffix = kind.suffix if isinstance(kind, Format) else ""
    for name, capability in kind.capabilities(spec).items():
        console.print(f"{name}: {capability}")
    described = source / MODEL if (source / MODEL).is_dir() else None
    tokenizer = source / TOKENIZER if described and (source / TOKENIZER).is_dir() else None
    spec = dataclasses.replace(spec, overwrite=options.overwrite)
    about: dict[str, Any] = {}
    if spec.is_checkpoint:
        about = {"model": described, "tokenizer": tokenizer}
    with steps():
        program, _ = load_run(source, lazy=True)
        if not suffix:
            report = export_model(program, out, spec, **about)
        else:
            with atomic_folder(out, overwrite=options.overwrite) as folder:
                file = folder / GGUF_FILE
                report = export_model(program, file, spec, **about)
                write_record(folder, report, spec)
    written = out / GGUF_FILE if suffix else out
    _show(dataclasses.replace(report, path=written), source, time.monotonic() - started)
    return 0


def _show(report: ExportReport, source: Path, seconds: float) -> None:
    for note in report.notes:
        console.print(f"note: {note}")
    odd = [row for row in report.stored if row.remark]
    if odd:
        print_table(
            f"stored otherwise than the plan says: {len(odd)}",
            ("tensor", "form", "why"),
            [(row.name, row.form, row.remark) for row in odd[:_SHOWN]],
        )
    worst = max(report.stored, key=lambda row: row.relative_error, default=None)
    forms = sorted({row.form for row in report.stored})
    counts = [f"{sum(row.form == form for row in report.stored)} {form}" for form in forms]
    print_summary(
        "export",
        {
            "target": report.target,
            "layers on codes": report.quantized_layers,
            "tensors": ", ".join(counts),
            "largest change of a weight": f"{worst.relative_error:.2g} of its tensor's largest "
            f"({worst.name})"
            if worst is not None and worst.relative_error
            else "none",
            "size": megabytes(report.size_bytes),
            "peak memory": megabytes(peak_memory()),
            "seconds": f"{seconds:.0f}",
            "written": str(report.path),
        }
        | (
            {"next": f"qalora-compile verify {source} {report.path} --max-rel 1e-2"}
            if report.target in CHECKPOINT_TARGETS
            else {}
        ),
    )
