"""`quantize`: quantize a model into an edge folder, layer by layer, without training."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.brief import megabytes
from qalora_compile.cli.export import (
    add_cache_argument,
    add_pooling_arguments,
    add_target_arguments,
    choice_rows,
    kernel_rows,
    pair_rows,
    resumed,
    target_spec,
)
from qalora_compile.cli.options import command_line, spec_of
from qalora_compile.cli.quantized import (
    add_calibration_arguments,
    add_embedding_choice,
    add_embedding_group,
    add_quant_arguments,
    add_stored_argument,
    print_reports,
)
from qalora_compile.cli.ui import print_summary, steps

if TYPE_CHECKING:
    from qalora_compile.api.quantize import QuantizeSpec

EXAMPLES = """examples:
  qalora-compile quantize ./Llama-7B --out edge
  qalora-compile quantize ./Llama-7B --out edge --bits 3 --group-size 64 \\
    --parameter-dtype float16
  # half of a small model's bytes
  qalora-compile quantize ./SmolLM2 --out edge --embeddings 8
  qalora-compile quantize ./Llama-7B --out edge --bits 3 --method hqq
  # the best 2- and 3-bit codes: minutes of training on two kinds of text
  qalora-compile quantize ./SmolLM2 --out edge --bits 3 --group-size 64 \\
    --method learned --calibration news.jsonl manuals.jsonl
  # sentence embeddings
  qalora-compile quantize ./MiniLM --out edge --pooling mean --normalize

Weights are read, quantized and written layer by layer, so memory does not
grow with the model. With --calibration the model runs on the data, so it is
held in memory, in float32. A checkpoint that is already quantized (GPTQ, AWQ,
HQQ, compressed-tensors, MLX) keeps its codes; its weights are held in memory,
in float32.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder with safetensors")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    add_quant_arguments(parser)
    add_stored_argument(parser)
    add_calibration_arguments(parser, otherwise="default: none")
    parser.add_argument(
        "--seq-len", type=int, default=512, metavar="N", help="cut calibration examples to N tokens"
    )
    add_embedding_choice(parser)
    add_embedding_group(parser)
    add_target_arguments(parser)
    add_cache_argument(parser)
    add_pooling_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DIR")


def quantize_spec(options: argparse.Namespace) -> QuantizeSpec:
    """The specification in the options.

    Raises:
        UserInputError: a value is out of range, or options conflict.
    """
    from qalora_compile.api.codes import CodesSpec
    from qalora_compile.api.quantize import QuantizeSpec

    bits = options.embeddings if isinstance(options.embeddings, int) else None
    return spec_of(
        QuantizeSpec,
        options,
        out=Path(options.out),
        codes=spec_of(CodesSpec, options, embeddings=bits),
        target=target_spec(options),
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.quantize import quantize_folder
    from qalora_compile.runtime.footprint import peak_memory

    started, spec = time.monotonic(), quantize_spec(options)
    with steps():
        result = quantize_folder(spec)
    report, out = result.report, spec.out
    print_reports(result.reports)
    print_summary(
        "quantize",
        {
            "target": report.target,
            "quantized layers": report.quantized_layers,
            "nodes": report.nodes,
            "size": megabytes(report.size_bytes),
            **(pair_rows(result.parts) if result.parts else {}),
            **(choice_rows(result.parts, report) if result.parts else {}),
            "next to it": ", ".join(result.written),
            "peak memory": megabytes(peak_memory()),
            "seconds": f"{time.monotonic() - started:.0f}",
            "written": str(report.path),
            "next": command_line("generate", out, "--prompt", "Hello")
            if result.generates
            else command_line("inspect", out),
        }
        | (kernel_rows(result.parts) if result.parts else {})
        | resumed(report),
    )
    return 0
