"""`generate`: continue a prompt with an exported model in ONNX Runtime."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from qalora_compile.brief import megabytes
from qalora_compile.cli.options import spec_of
from qalora_compile.cli.ui import console, print_summary

EXAMPLES = """examples:
  qalora-compile generate edge --prompt "The capital of France is"
  qalora-compile generate edge --prompt "Hi" --chat --temperature 0.7 \\
    --top-p 0.9 --seed 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="DIR", help="folder written by export")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="most tokens to add"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="F", help="0 is greedy")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens of this probability",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of ONNX Runtime (default: its own choice)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.generate import GenerateSpec, generate
    from qalora_compile.runtime.footprint import peak_memory

    made = generate(spec_of(GenerateSpec, options, folder=Path(options.folder)))
    started = time.monotonic()
    count, first = 0, 0.0
    for piece in made.pieces:
        first = first or time.monotonic() - started
        count += 1
        console.print(piece, end="", soft_wrap=True)
    console.print()
    seconds = time.monotonic() - started
    print_summary(
        "generate",
        {
            "prompt tokens": len(made.prompt),
            "new tokens": count,
            "first token": f"{first:.3f} s" if count else "none generated",
            "tokens/s after it": _rate(count - 1, seconds - first),
            "key-value cache": "yes" if made.cached else "no: each token runs all before it again",
            "peak memory": megabytes(peak_memory()),
        },
    )
    return 0


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.1f}" if count > 0 and seconds > 0 else "only one token"
