"""`export`: write a FOLDED folder as an edge folder (ONNX model, tokenizer, configurations)."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from qalora_compile.api.deploy import DeploySpec, EdgeResult, EdgeSpec, export_folder
from qalora_compile.api.edge import EdgeParts
from qalora_compile.brief import megabytes
from qalora_compile.cli.options import spec_of
from qalora_compile.cli.ui import console, print_summary, print_table, steps
from qalora_compile.config import (
    ACCURACY_LEVELS,
    CHECKPOINT_TARGETS,
    CORRECTIONS,
    FLOAT_TYPES,
    FUSIONS,
    PARAMETER_DTYPES,
    ExportSpec,
)
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.ir.program import Program
from qalora_compile.passes.pool_tokens import POOLINGS
from qalora_compile.registry import TARGETS
from qalora_compile.runtime.footprint import peak_memory
from qalora_compile.runtime.library import kernel_level, library_path

NAME = "export"
SUMMARY = "write a folded model as one ONNX file, or as a checkpoint of another library"
EXAMPLES = """examples:
  qalora-compile export folded --out edge
  qalora-compile export folded --out edge --accuracy-level 4 --parameter-dtype float16
                                                        int8 activations: fastest, 5e-3 error
  qalora-compile export folded --out edge --target ort-stock   no functions, MatMulNBits throughout
  qalora-compile export folded --out edge --target onnx        standard operators only
  qalora-compile export folded --out edge --with-library       for GenAI: our kernels in the folder
  qalora-compile export folded --out edge --no-kv-cache        one pass over complete sequences
  qalora-compile export folded --out edge --pooling mean --normalize     sentence embeddings
  qalora-compile export run --out edge --allow-unfolded        keep the adapters in the graph
  qalora-compile export folded --out edge --target gguf        model.gguf for llama.cpp
  qalora-compile export folded --out edge --target float       Hugging Face folder, no codes

Language models get a key-value cache, and the folder runs unchanged in ONNX Runtime GenAI.
Encoder-decoder models (T5, BART, Whisper) become two graphs.
"""
_SHOWN = 8
"""Largest number of checkpoint tensors listed whose stored form differs from the plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="FOLDED", help="folder written by fold")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    add_target_arguments(parser)
    add_pooling_arguments(parser)
    add_cache_argument(parser)
    parser.add_argument("--allow-unfolded", action="store_true", help="export adapters unmerged")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DIR")


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Declare options of generating models."""
    parser.add_argument("--no-kv-cache", action="store_true", help="write no key-value cache")


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the target and its options."""
    defaults = ExportSpec()
    parser.add_argument(
        "--target", default=defaults.target, help=f"one of {', '.join(TARGETS.names())}"
    )
    parser.add_argument(
        "--opset", type=int, metavar="N", help="ONNX opset, default 20; 21 for target onnx"
    )
    parser.add_argument(
        "--accuracy-level",
        type=int,
        default=0,
        choices=ACCURACY_LEVELS,
        help="0: float32 activations, 2 (target ort): two int8 digits each, 4: int8",
    )
    parser.add_argument(
        "--parameter-dtype",
        default=defaults.parameter_dtype,
        choices=PARAMETER_DTYPES,
        help="dtype of scale and zero-point in target ort and in checkpoints; float16 rounds them",
    )
    parser.add_argument(
        "--correction",
        default=defaults.correction,
        choices=CORRECTIONS,
        help="form of real zero-points in target ort-stock; digits is faster and rounds",
    )
    parser.add_argument(
        "--fusion",
        choices=FUSIONS,
        help="operators of norms, rotary embeddings, attention; default with a cache: standard",
    )
    parser.add_argument(
        "--float-type",
        choices=FLOAT_TYPES,
        help="dtype of unquantized matrices in target gguf; default: the smallest exact one",
    )
    parser.add_argument(
        "--last-logits", action="store_true", help="output the last token's logits only; with cache"
    )
    parser.add_argument(
        "--with-library",
        nargs="?",
        const="",
        metavar="FILE",
        help="copy the operator library (this machine's, or FILE) into DIR, for GenAI to load",
    )


def add_pooling_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the pooling of encoders."""
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="add the output sentence_embedding to an encoder: mean of the tokens, or the first",
    )
    parser.add_argument(
        "--normalize", action="store_true", help="divide sentence_embedding by its norm"
    )


def target_spec(options: argparse.Namespace) -> ExportSpec:
    """The export specification in the options of `add_target_arguments`."""
    return spec_of(ExportSpec, options, overwrite=False)


def deploy_spec(options: argparse.Namespace) -> DeploySpec:
    """The specification in the options.

    Raises:
        UserInputError: a value is out of range, or options conflict.
    """
    return spec_of(
        DeploySpec,
        options,
        folder=Path(options.folder),
        out=Path(options.out),
        target=target_spec(options),
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    started, spec = time.monotonic(), deploy_spec(options)
    with steps():
        result = export_folder(spec)
    for name, capability in result.report.capabilities.items():
        console.print(f"{name}: {capability}")
    seconds = time.monotonic() - started
    if result.parts is None:
        _show_checkpoint(result.report, spec.folder, seconds)
    else:
        _show_edge(spec, result, result.parts, seconds)
    return 0


def _show_edge(spec: DeploySpec, result: EdgeResult, parts: EdgeParts, seconds: float) -> None:
    report = result.report
    print_summary(
        "export",
        {
            "target": report.target,
            "quantized layers": report.quantized_layers,
            "nodes": report.nodes,
            "size": megabytes(report.size_bytes),
            "peak memory": megabytes(peak_memory()),
            "key-value cache": _cache_state(spec, parts.program),
            **pair_rows(parts),
            "next to it": ", ".join(result.written),
            "seconds": f"{seconds:.0f}",
            "written": str(report.path),
            "next": f"qalora-compile verify {spec.folder} {spec.out} --max-abs 1e-3",
        }
        | ({"kernels": kernels()} if report.target == "ort" else {})
        | resumed(report),
    )


def _cache_state(spec: EdgeSpec, program: Program) -> str:
    if program.signature.cache:
        return "yes, logits of the last token" if spec.last_logits else "yes"
    return "left out" if spec.no_kv_cache else "none: not a generating transformers model"


def resumed(report: ExportReport) -> dict[str, str]:
    """Rows of the summary on a resumed export, and on what was not fused."""
    rows = {"notes": "\n".join(report.notes)} if report.notes else {}
    if report.kept:
        rows["resumed"] = f"{report.kept} weights were kept from an interrupted run"
    return rows


def pair_rows(parts: EdgeParts) -> dict[str, str]:
    """Rows of the summary on a model in two graphs."""
    if parts.pair is None:
        return {}
    both = [f"{name} ({megabytes(size)})" for name, size in parts.in_both().items()]
    return {"graphs": ", ".join(parts.graphs), "in both files": ", ".join(both) or "nothing"}


def kernels() -> str:
    """The kernels that run a model of target `ort` on this machine."""
    level = kernel_level()
    if level is None:
        return "stock, the operator library was not built: qalora-compile doctor"
    return f"stock, or {level} with the operator library: {library_path().name}"


def _show_checkpoint(report: ExportReport, source: Path, seconds: float) -> None:
    for note in report.notes:
        console.print(f"note: {note}")
    odd = [row for row in report.stored if row.remark]
    if odd:
        print_table(
            f"stored in another form than planned: {len(odd)}",
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
