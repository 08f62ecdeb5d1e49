"""`quantize`: a model straight to an edge folder, layer by layer, without training."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from qalora_compile.api import quantize_groups
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.capture.checkpoints.open_folder import is_quantized
from qalora_compile.capture.lazy_folder import capture_checkpoint
from qalora_compile.capture.load_source import load_source
from qalora_compile.capture.sentence import encoder_folder
from qalora_compile.capture.skeleton import generates
from qalora_compile.cli.edge import MODEL_FILE, EdgeParts, edge_graphs, lowered, write_edge
from qalora_compile.cli.export import (
    add_cache_argument,
    add_target_arguments,
    chosen_library,
    kernels,
    pair_rows,
    resumed,
    target_spec,
)
from qalora_compile.cli.pooling import add_pooling_arguments, chosen_pooling
from qalora_compile.cli.quantized import (
    add_embedding_arguments,
    add_quant_arguments,
    add_stored_argument,
    embedding_record,
    embedding_spec,
    print_reports,
    quant_spec,
    stored_codes,
)
from qalora_compile.cli.ui import Steps, megabytes, print_summary, steps
from qalora_compile.config import ExportSpec, QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.files import reserve
from qalora_compile.ir.checkpoint_codes import CheckpointCodes
from qalora_compile.ir.program import Program
from qalora_compile.quantizers import needs_data
from qalora_compile.quantizers.report import collecting_reports
from qalora_compile.runtime.footprint import peak_memory

NAME = "quantize"
SUMMARY = "quantize a model of any size straight to an edge folder, without training"
EXAMPLES = """examples:
  qalora-compile quantize ./Llama-7B --out edge
  qalora-compile quantize ./Llama-7B --out edge --bits 3 --group-size 64 --parameter-dtype float16
  qalora-compile quantize ./SmolLM2 --out edge --embeddings 8     half of a small model's bytes
  qalora-compile quantize ./Llama-7B --out edge --bits 3 --method hqq
  qalora-compile quantize ./MiniLM --out edge --pooling mean --normalize   sentence embeddings

weights are read, quantized and written one layer after another: memory does not grow with the
model. A folder that is quantized already (GPTQ, AWQ, HQQ, compressed-tensors, MLX) keeps its codes;
its weights are in memory meanwhile, in float32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder with safetensors")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    add_quant_arguments(parser)
    add_stored_argument(parser)
    add_embedding_arguments(parser)
    add_target_arguments(parser)
    add_cache_argument(parser)
    add_pooling_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DIR")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    quant, spec = _data_free(quant_spec(options)), _onnx_spec(options)
    inputs = [options.model, options.with_library or None]
    with reserve(Path(options.out), overwrite=options.overwrite, inputs=inputs):
        return _quantize(options, quant, spec)


def _quantize(options: argparse.Namespace, quant: QuantSpec, spec: ExportSpec) -> int:
    started = time.monotonic()
    out = Path(options.out)
    embeddings = embedding_spec(options)
    library = chosen_library(options)
    _check_folder(Path(options.model))
    pooling = chosen_pooling(options, Path(options.model))
    source = encoder_folder(Path(options.model))
    with steps() as shown, collecting_reports() as reports:
        shown.say("capture")
        program, stored = _captured(options, source, shown)
        for note in program.notes:
            shown.say(f"note: {note}")
        program = pooling.apply(program)
        program = quantize_groups(
            program,
            quant,
            targets=options.targets or "all-linear",
            exclude=options.exclude,
            embeddings=embeddings,
            stored=stored,
        )
        graphs = {MODEL_FILE: program}
        if not program.signature.cache and not options.no_kv_cache:
            graphs = edge_graphs(program, source, last_logits=options.last_logits)
        graphs, spec = lowered(graphs, spec)
        shown.say("translate to ONNX, then read, quantize and write the weights")
        parts = EdgeParts(
            description=source,
            tokenizer=source,
            record={"model": options.model, "quant": quant.to_json()}
            | embedding_record(embeddings),
            graphs=graphs,
            spec=spec,
            library=library,
            weights=source,
            pooling=pooling,
        )
        report, written = write_edge(out, parts, overwrite=options.overwrite)
    print_reports(reports)
    print_summary(
        "quantize",
        {
            "target": report.target,
            "quantized layers": report.quantized_layers,
            "nodes": report.nodes,
            "size": megabytes(report.size_bytes),
            **pair_rows(parts),
            "beside it": ", ".join(written),
            "peak memory": megabytes(peak_memory()),
            "seconds": f"{time.monotonic() - started:.0f}",
            "written": str(report.path),
            "next": f'qalora-compile generate {out} --prompt "Hello"'
            if generates(source)
            else f"qalora-compile inspect {out}",
        }
        | ({"kernels": kernels()} if report.target == "ort" else {})
        | resumed(report),
    )
    return 0


def _captured(
    options: argparse.Namespace, source: Path, shown: Steps
) -> tuple[Program, CheckpointCodes | None]:
    """The program, its weights in their files; and the codes to keep, of a quantized checkpoint.

    The weights of a quantized checkpoint are in memory: codes are found by the rows they stand for.

    Raises:
        UserInputError: the folder cannot be read; or it holds no codes, and options say of which
            kind they are.
    """
    cache, last_logits = not options.no_kv_cache, options.last_logits
    if not is_quantized(source):
        if options.stored_zero_points is not None:
            raise UserInputError(
                "--stored-zero-points is of a checkpoint that is quantized, and this one is not",
                where=str(source),
                hint="leave it out",
            )
        return capture_checkpoint(source, last_logits=last_logits, cache=cache), None
    loaded = load_source(str(source), zero_points=options.stored_zero_points)
    shown.say("note: the checkpoint is quantized already: its weights are in memory, in float32")
    codes = stored_codes(options, loaded, shown)
    if loaded.decoder_start is not None or not cache or not generates(source):
        return loaded.capture(), codes
    return capture_causal_lm(loaded.model, last_logits=last_logits), codes


def _data_free(quant: QuantSpec) -> QuantSpec:
    """The specification, whose method has to do without calibration data.

    Raises:
        UserInputError: it needs some.
    """
    if needs_data(quant.method):
        raise UserInputError(
            f"the method {quant.method} needs calibration data, which quantize does not take: it "
            "never holds the whole model, so it cannot run it",
            hint="finetune --method gptq --steps 0, then fold and export; or --method hqq",
        )
    return quant


def _onnx_spec(options: argparse.Namespace) -> ExportSpec:
    """What is written: an ONNX model.

    Raises:
        UserInputError: the target is a checkpoint, or of an extension.
    """
    spec = target_spec(options)
    if not spec.is_onnx:
        raise UserInputError(
            f"quantize writes ONNX models, not target {spec.target}",
            hint="finetune --steps 0, fold, then export with that target",
        )
    return spec


def _check_folder(source: Path) -> None:
    """The model is a folder.

    Raises:
        UserInputError: it is not.
    """
    if not source.is_dir():
        raise UserInputError(
            f"there is no folder {source}",
            where=str(source),
            hint="quantize takes a Hugging Face folder; finetune also takes .gguf files",
        )
