"""`export`: write a FOLDED folder as an edge folder: ONNX model, tokenizer, configurations."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from qalora_compile.cli.checkpoint import export_checkpoint
from qalora_compile.cli.edge import MODEL_FILE, EdgeParts, edge_graphs, lowered, write_edge
from qalora_compile.cli.folders import MODEL, TOKENIZER, load_run
from qalora_compile.cli.pooling import add_pooling_arguments, chosen_pooling
from qalora_compile.cli.ui import console, megabytes, print_summary, steps
from qalora_compile.config import (
    ACCURACY_LEVELS,
    CORRECTIONS,
    FLOAT_TYPES,
    FUSIONS,
    PARAMETER_DTYPES,
    ExportSpec,
)
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.capability import ExportReport
from qalora_compile.files import reserve
from qalora_compile.ir.program import Program
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
  qalora-compile export folded --out edge --no-kv-cache        one forward of whole sequences
  qalora-compile export folded --out edge --pooling mean --normalize     sentence embeddings
  qalora-compile export run --out edge --allow-unfolded        keep the adapters in the graph
  qalora-compile export folded --out edge --target gguf        model.gguf for llama.cpp
  qalora-compile export folded --out edge --target float       Hugging Face folder, no codes

language models get a key-value cache, and the folder runs in ONNX Runtime GenAI as it is;
encoder-decoder models (T5, BART, Whisper) become two graphs, encoder and decoder
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="FOLDED", help="folder written by fold")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    add_target_arguments(parser)
    add_pooling_arguments(parser)
    add_cache_argument(parser)
    parser.add_argument(
        "--allow-unfolded", action="store_true", help="export adapters that are not folded"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DIR")


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Declare how a model that generates is written."""
    parser.add_argument(
        "--no-kv-cache", action="store_true", help="a language model without key-value cache"
    )


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is written and how."""
    defaults = ExportSpec()
    parser.add_argument(
        "--target", default=defaults.target, help=f"one of {', '.join(TARGETS.names())}"
    )
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
        help="of scale and zero-point in target ort and in checkpoints; float16 rounds them",
    )
    parser.add_argument(
        "--correction",
        default=defaults.correction,
        choices=CORRECTIONS,
        help="of zero-points in target ort-stock; digits is faster and rounds",
    )
    parser.add_argument(
        "--fusion",
        choices=FUSIONS,
        help="how norms, rotary embeddings and attention are written; with a cache: standard",
    )
    parser.add_argument(
        "--float-type",
        choices=FLOAT_TYPES,
        help="of matrices that are not on codes, in target gguf; else the smallest exact one",
    )
    parser.add_argument(
        "--last-logits", action="store_true", help="logits of the last token alone; with cache"
    )
    parser.add_argument(
        "--with-library",
        nargs="?",
        const="",
        metavar="FILE",
        help="put the operator library (this machine's, or FILE) into DIR, for GenAI to load",
    )


def target_spec(options: argparse.Namespace) -> ExportSpec:
    """What `add_target_arguments` has read."""
    return ExportSpec(
        target=options.target,
        opset=options.opset,
        accuracy_level=options.accuracy_level,
        parameter_dtype=options.parameter_dtype,
        correction=options.correction,
        fusion=options.fusion,
        float_type=options.float_type,
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    spec = dataclasses.replace(target_spec(options), allow_unfolded=options.allow_unfolded)
    inputs = [options.folder, options.with_library or None]
    with reserve(Path(options.out), overwrite=options.overwrite, inputs=inputs):
        if not spec.is_onnx:
            if options.pooling or options.normalize:
                raise UserInputError(
                    f"--pooling is of ONNX models, not of target {spec.target}",
                    hint="leave it out: no other target pools",
                )
            return export_checkpoint(options, spec)
        return _export_onnx(options, spec)


def _export_onnx(options: argparse.Namespace, spec: ExportSpec) -> int:
    started = time.monotonic()
    source, out = Path(options.folder), Path(options.out)
    library = chosen_library(options)
    with steps() as shown:
        program, record = load_run(source, lazy=True)
        pooling = chosen_pooling(options, source / MODEL)
        program = pooling.apply(program)
        graphs = {MODEL_FILE: program}
        if not options.no_kv_cache and (source / MODEL).is_dir():
            shown.say("capture for a device")
            graphs = edge_graphs(program, source / MODEL, last_logits=options.last_logits)
        graphs, spec = lowered(graphs, spec)
        shown.say("translate to ONNX")
        parts = EdgeParts(
            description=source / MODEL,
            tokenizer=source / TOKENIZER,
            record=record,
            graphs=graphs,
            spec=spec,
            library=library,
            weights=source,
            pooling=pooling,
        )
        report, written = write_edge(out, parts, overwrite=options.overwrite)
    for name, capability in report.capabilities.items():
        console.print(f"{name}: {capability}")
    print_summary(
        "export",
        {
            "target": report.target,
            "quantized layers": report.quantized_layers,
            "nodes": report.nodes,
            "size": megabytes(report.size_bytes),
            "peak memory": megabytes(peak_memory()),
            "key-value cache": _cache_state(options, parts.program),
            **pair_rows(parts),
            "beside it": ", ".join(written),
            "seconds": f"{time.monotonic() - started:.0f}",
            "written": str(report.path),
            "next": f"qalora-compile verify {source} {out} --max-abs 1e-3",
        }
        | ({"kernels": kernels()} if report.target == "ort" else {})
        | resumed(report),
    )
    return 0


def chosen_library(options: argparse.Namespace) -> Path | None:
    """The operator library to put into the folder.

    Raises:
        UserInputError: the file is missing, or the target does not use it.
        UnsupportedError: this machine's was not built.
    """
    if options.with_library is None:
        return None
    if options.target != "ort":
        raise UserInputError(
            f"--with-library has no use with target {options.target}", hint="use --target ort"
        )
    path = Path(options.with_library) if options.with_library else library_path()
    if not path.is_file():
        raise UserInputError(f"there is no library {path}", where=str(path))
    return path


def resumed(report: ExportReport) -> dict[str, str]:
    """Rows of the summary: an interrupted run that was gone on with, and what was not fused."""
    rows = {"notes": "\n".join(report.notes)} if report.notes else {}
    if report.kept:
        rows["gone on"] = f"{report.kept} weights were there from an interrupted run"
    return rows


def _cache_state(options: argparse.Namespace, program: Program) -> str:
    if program.signature.cache:
        return "yes, logits of the last token" if options.last_logits else "yes"
    return "left out" if options.no_kv_cache else "none: no transformers model that generates"


def pair_rows(parts: EdgeParts) -> dict[str, str]:
    """What a summary says of a model in two graphs."""
    if parts.pair is None:
        return {}
    both = [f"{name} ({megabytes(size)})" for name, size in parts.in_both().items()]
    return {"graphs": ", ".join(parts.graphs), "in both files": ", ".join(both) or "nothing"}


def kernels() -> str:
    """What a model of target `ort` runs on here."""
    level = kernel_level()
    if level is None:
        return "stock, the operator library was not built: qalora-compile doctor"
    return f"stock, or {level} with the operator library: {library_path().name}"
