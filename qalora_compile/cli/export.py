"""`export`: write a FOLDED folder as an edge folder (ONNX model, tokenizer, configurations)."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.brief import megabytes
from qalora_compile.cli.options import command_line, spec_of
from qalora_compile.cli.quantized import add_embedding_choice
from qalora_compile.cli.ui import console, print_summary, print_table, steps
from qalora_compile.config import (
    ACCURACY_LEVELS,
    AUTO,
    CHECKPOINT_TARGETS,
    CORRECTIONS,
    EXPANSIONS,
    FLOAT_TYPES,
    FORMATS,
    FUSIONS,
    PARAMETER_DTYPES,
    PRESETS,
    ExportSpec,
)
from qalora_compile.config.choices import TOKEN_POOLINGS
from qalora_compile.config.onnx_releases import RELEASES, RUNTIME
from qalora_compile.registry import TARGETS

if TYPE_CHECKING:
    from qalora_compile.api.deploy import DeploySpec, EdgeResult, EdgeSpec
    from qalora_compile.api.edge import EdgeParts
    from qalora_compile.exporters.capability import ExportReport
    from qalora_compile.ir.program import Program

EXAMPLES = """examples:
  qalora-compile export folded --out edge
  # int8 activations: 5e-3 error
  qalora-compile export folded --out edge --preset fast
  # smallest but for one
  qalora-compile export folded --out edge --preset small --embeddings 8
  # for WebAssembly: weights in float, made when the file is loaded
  qalora-compile export folded --out edge --preset web
  # no functions, MatMulNBits throughout
  qalora-compile export folded --out edge --target ort-stock
  # standard operators only
  qalora-compile export folded --out edge --target onnx
  # model_q4.ort for reduced builds of ONNX Runtime
  qalora-compile export folded --out edge --format ort
  # an older release of ONNX Runtime
  qalora-compile export folded --out edge --for onnxruntime==1.18
  # openvino_model.xml, with state
  qalora-compile export folded --out edge --target openvino
  # model.pt2 for torch, and model_aot.pt2 for C++
  qalora-compile export folded --out edge --target torch --aot
  # model.mlpackage for Apple devices, one pass over complete sequences
  qalora-compile export folded --out edge --target coreml --no-kv-cache
  # for GenAI: our kernels in the folder
  qalora-compile export folded --out edge --with-library
  # one pass over complete sequences
  qalora-compile export folded --out edge --no-kv-cache
  # sentence embeddings
  qalora-compile export folded --out edge --pooling mean --normalize
  # keep the adapters in the graph
  qalora-compile export run --out edge --allow-unfolded
  # model.gguf for llama.cpp
  qalora-compile export folded --out edge --target gguf
  # Hugging Face folder, no codes
  qalora-compile export folded --out edge --target float

Language models get a key-value cache, and the folder runs unchanged in ONNX
Runtime GenAI. Encoder-decoder models (T5, BART, Whisper) become two graphs.
"""
_SHOWN = 8
"""Largest number of checkpoint tensors listed whose stored form differs from the plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="FOLDED", help="folder written by fold")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    add_target_arguments(parser)
    add_embedding_choice(parser)
    add_pooling_arguments(parser)
    add_cache_argument(parser)
    parser.add_argument("--allow-unfolded", action="store_true", help="export adapters unmerged")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DIR")


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Declare options of generating models."""
    parser.add_argument("--no-kv-cache", action="store_true", help="write no key-value cache")
    parser.add_argument(
        "--no-state",
        dest="stateful",
        action="store_false",
        default=None,
        help="target openvino: the key-value cache as inputs and outputs, not as state",
    )


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the target and its options."""
    defaults = ExportSpec()
    parser.add_argument(
        "--target", default=defaults.target, help=f"one of {', '.join(TARGETS.names())}"
    )
    parser.add_argument(
        "--opset",
        type=int,
        metavar="N",
        help="ONNX opset (default: 23 with fusion standard, as with a cache; else 21 for target "
        "onnx, 20 for others)",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="exact: float32 throughout; fast: int8 activations, float16 scales, 8-bit embeddings; "
        "small: float16 scales, 4-bit embeddings; web: for WASM, weights in float "
        "once loaded, 8-bit embeddings; default: what changes no output noticeably",
    )
    parser.add_argument(
        "--accuracy-level",
        type=int,
        choices=ACCURACY_LEVELS,
        help="0: float32 activations, 2 (target ort): two int8 digits each, 4: int8 (default: "
        "that of the preset, else 0)",
    )
    parser.add_argument(
        "--parameter-dtype",
        choices=(*PARAMETER_DTYPES, AUTO),
        help="dtype of scale and zero-point in targets ort, openvino and in checkpoints; float16 "
        "rounds them; auto, for ort and openvino: float16 if no weight moves by it (default: "
        "that of the preset, else auto for ort, float32 elsewhere)",
    )
    parser.add_argument(
        "--expansion",
        choices=EXPANSIONS,
        help="target ort without the operator library: nbits is MatMulNBits, float products by "
        "weights that are made from the codes at load (default: that of the preset, else nbits)",
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
    _add_runtime_arguments(parser)
    add_output_arguments(parser)


def _add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the runtime that the file is for."""
    parser.add_argument(
        "--aot",
        action="store_true",
        help="target torch: also compile with AOTInductor, to model_aot.pt2 for C++; needs g++",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="ort: a .ort file for reduced builds of ONNX Runtime, with the list of its operators; "
        "default: onnx",
    )
    parser.add_argument(
        "--for",
        dest="runtime",
        metavar="RUNTIME",
        help=f"the release that has to run the model, {RUNTIME}=={RELEASES[0].version} to "
        f"{RELEASES[-1].version}, or {RUNTIME}>=V; chooses opset, fusion and forms of layers",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the folder's model outputs, and whether the folder has the library."""
    parser.add_argument(
        "--last-logits",
        action="store_true",
        default=None,
        help="output the last token's logits only; the default of a decoder with a cache",
    )
    parser.add_argument(
        "--all-logits",
        dest="last_logits",
        action="store_false",
        help="output the logits of all tokens, for perplexity and scoring",
    )
    parser.add_argument(
        "--merged-decoder",
        action="store_true",
        help="write an encoder-decoder model as transformers.js and optimum take it; default: only "
        "with preset web",
    )
    parser.add_argument(
        "--external-data",
        action="store_true",
        help="write the weights to a second file, which needs less memory to load; default: one "
        "file, up to 1.9 GB",
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
        choices=TOKEN_POOLINGS,
        help="add the output sentence_embedding to an encoder: mean of the tokens, or the first",
    )
    parser.add_argument(
        "--normalize", action="store_true", help="divide sentence_embedding by its norm"
    )


def target_spec(options: argparse.Namespace) -> ExportSpec:
    """The export specification in the options of `add_target_arguments`.

    Raises:
        UserInputError: a value is out of range, or options conflict.
    """
    names = {field.name for field in dataclasses.fields(ExportSpec)} - {"overwrite"}
    given = {n: v for n, v in vars(options).items() if n in names and v is not None}
    return ExportSpec.from_preset(options.preset, **given)


def deploy_spec(options: argparse.Namespace) -> DeploySpec:
    """The specification in the options.

    Raises:
        UserInputError: a value is out of range, or options conflict.
    """
    from qalora_compile.api.deploy import DeploySpec

    return spec_of(
        DeploySpec,
        options,
        folder=Path(options.folder),
        out=Path(options.out),
        target=target_spec(options),
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.deploy import export_folder

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
    from qalora_compile.runtime.footprint import peak_memory

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
            **choice_rows(parts, report),
            "next to it": ", ".join(result.written),
            "seconds": f"{seconds:.0f}",
            "written": str(report.path),
            "next": command_line("verify", spec.folder, spec.out, *_tolerance(report)),
        }
        | kernel_rows(parts)
        | resumed(report),
    )


def _tolerance(report: ExportReport) -> tuple[str, str]:
    """The tolerance that fits what the target rounds."""
    rounds = any(capability.kind == "rounds" for capability in report.capabilities.values())
    return ("--max-rel", "1e-1" if rounds else "1e-3")


def _cache_state(spec: EdgeSpec, program: Program) -> str:
    from qalora_compile.api.edge_graphs import outputs_last_logits

    if program.signature.cache:
        return "yes, logits of the last token" if outputs_last_logits(program) else "yes"
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
    return {"graphs": ", ".join(parts.files), "in both files": ", ".join(both) or "nothing"}


def choice_rows(parts: EdgeParts, report: ExportReport) -> dict[str, str]:
    """Rows of the summary on the preset and its figures."""
    return {} if parts.choices is None else parts.choices.rows(parts.spec, report.size_bytes)


def kernel_rows(parts: EdgeParts) -> dict[str, str]:
    """A row of the summary on the kernels that run a model of target `ort` on this machine."""
    if parts.spec.target != "ort":
        return {}
    from qalora_compile.runtime.library import kernel_level, library_path

    level = kernel_level()
    if parts.spec.format == "ort":
        return {"kernels": "stock: a .ort file has no operators of the library"}
    if level is None:
        return {"kernels": "stock, the operator library was not built: qalora-compile doctor"}
    return {"kernels": f"stock, or {level} with the operator library: {library_path().name}"}


def _show_checkpoint(report: ExportReport, source: Path, seconds: float) -> None:
    from qalora_compile.runtime.footprint import peak_memory

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
            {"next": command_line("verify", source, report.path, "--max-rel", "1e-2")}
            if report.target in CHECKPOINT_TARGETS
            else {}
        ),
    )
