"""`export`: write a FOLDED folder as an ONNX model with its tokenizer."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from qalora_compile.api import export_model, lower
from qalora_compile.cli.folders import copy_tokenizer, load_run
from qalora_compile.cli.ui import console, megabytes, print_summary, steps
from qalora_compile.config import (
    ACCURACY_LEVELS,
    CORRECTIONS,
    PARAMETER_DTYPES,
    TARGETS,
    ExportSpec,
)
from qalora_compile.files import atomic_folder, check_output
from qalora_compile.runtime.library import kernel_level, library_path

NAME = "export"
SUMMARY = "write a folded model as one ONNX file for ONNX Runtime"
EXAMPLES = """examples:
  qalora-compile export folded --out edge
  qalora-compile export folded --out edge --accuracy-level 4 --parameter-dtype float16
                                                        int8 activations: fastest, 5e-3 error
  qalora-compile export folded --out edge --target ort-stock   no functions, MatMulNBits throughout
  qalora-compile export folded --out edge --target onnx        standard operators only
  qalora-compile export run --out edge --allow-unfolded        keep the adapters in the graph
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    defaults = ExportSpec()
    parser.add_argument("folder", metavar="FOLDED", help="folder written by fold")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--target", default=defaults.target, help=f"one of {', '.join(TARGETS)}")
    parser.add_argument(
        "--opset", type=int, metavar="N", help="version of the standard operators (20; onnx: 21)"
    )
    parser.add_argument(
        "--accuracy-level",
        type=int,
        default=0,
        choices=ACCURACY_LEVELS,
        help="0 float32, 4 int8 activations",
    )
    parser.add_argument(
        "--parameter-dtype",
        default=defaults.parameter_dtype,
        choices=PARAMETER_DTYPES,
        help="of scale and zero-point in target ort; float16 rounds them",
    )
    parser.add_argument(
        "--correction",
        default=defaults.correction,
        choices=CORRECTIONS,
        help="of zero-points in target ort-stock; digits is faster and rounds",
    )
    parser.add_argument(
        "--allow-unfolded", action="store_true", help="export adapters that are not folded"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DIR")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    started = time.monotonic()
    source, out = Path(options.folder), Path(options.out)
    spec = ExportSpec(
        target=options.target,
        opset=options.opset,
        accuracy_level=options.accuracy_level,
        parameter_dtype=options.parameter_dtype,
        correction=options.correction,
        allow_unfolded=options.allow_unfolded,
    )
    check_output(out, overwrite=options.overwrite)
    with steps() as shown:
        program, _ = load_run(source)
        lowered = lower(program, spec)
        shown.say("translate to ONNX")
        with atomic_folder(out, overwrite=options.overwrite) as folder:
            report = export_model(lowered, folder / "model.onnx", spec)
            report = dataclasses.replace(report, path=out / "model.onnx")
            has_tokenizer = copy_tokenizer(source, folder)
    for name, capability in report.capabilities.items():
        console.print(f"{name}: {capability}")
    print_summary(
        "export",
        {
            "target": report.target,
            "quantized layers": report.quantized_layers,
            "nodes": report.nodes,
            "size": megabytes(report.size_bytes),
            "tokenizer": "copied" if has_tokenizer else "none",
            "seconds": f"{time.monotonic() - started:.0f}",
            "written": str(report.path),
            "next": f"qalora-compile verify {source} {out} --max-abs 1e-3",
        }
        | ({"kernels": _kernels()} if report.target == "ort" else {}),
    )
    return 0


def _kernels() -> str:
    """What a model of target `ort` runs on here."""
    level = kernel_level()
    if level is None:
        return "stock, the operator library was not built: qalora-compile doctor"
    return f"stock, or {level} with the operator library: {library_path().name}"
