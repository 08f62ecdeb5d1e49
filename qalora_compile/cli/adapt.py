"""`adapt`: a base model and adapters that PEFT has trained; writes a RUN folder for `fold`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from qalora_compile.api.adapt import APPROXIMATE, MERGE, REFUSE, AdaptSpec, adapt
from qalora_compile.capture.peft_adapters import POOLINGS
from qalora_compile.cli.options import spec_of
from qalora_compile.cli.quantized import (
    add_quant_arguments,
    add_stored_argument,
    codes_of,
    print_reports,
)
from qalora_compile.cli.ui import print_summary, steps

NAME = "adapt"
SUMMARY = "quantize a model and take adapters that PEFT has trained; writes a RUN folder"
EXAMPLES = """examples:
  qalora-compile adapt ./Llama --adapter ./qalora-adapter --out run
  qalora-compile adapt ./Llama --adapter ./english ./polite --weights 1.0 0.5 --out run
  qalora-compile adapt ./Llama --adapter ./lora --plain approximate --out run
  qalora-compile adapt ./Llama --adapter ./lora --plain merge --bits 8 --out run
  then: qalora-compile fold run --out folded

adapters trained with use_qalora fold exactly, where their group is a multiple of --group-size.
plain LoRA does not: --plain approximate takes the nearest update that does, --plain merge adds it
to the float weights before these are quantized.
adapters of the QA-LoRA authors' script pool without saying so: --pooling mean.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="HF folder or .gguf file: the base")
    parser.add_argument(
        "--adapter", required=True, nargs="+", metavar="DIR", help="folders of PEFT adapters"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="of each adapter in their sum; 1"
    )
    parser.add_argument(
        "--plain",
        default=REFUSE,
        choices=(REFUSE, APPROXIMATE, MERGE),
        help="what to do with updates that do not fold",
    )
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="of adapters whose lora_A is [r, K / g] and whose settings do not say use_qalora",
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="folder to write")
    add_quant_arguments(parser)
    add_stored_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing RUN")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    started = time.monotonic()
    spec = spec_of(AdaptSpec, options, out=Path(options.out), codes=codes_of(options))
    with steps():
        result = adapt(spec)
    print_reports(result.reports)
    print_summary(
        "adapt",
        {
            "model": spec.model,
            "trained on": ", ".join(base or "not said" for base in result.bases),
            "quantized layers": len(result.program.plan.to_quantize()),
            "adapted layers": result.adapted,
            "updates": _fidelity(result.lost, result.rounded, merged=spec.plain == MERGE),
            "full parameters put in": result.saved,
            "seconds": f"{time.monotonic() - started:.0f}",
            "written": str(spec.out),
            "next": f"qalora-compile fold {spec.out} --out FOLDED",
        },
    )
    return 0


def _fidelity(lost: Mapping[str, float], rounded: Sequence[str], *, merged: bool) -> str:
    """How the updates were taken."""
    if rounded:
        return (
            "added to the float weights, which were then quantized; "
            f"{len(rounded)} stay in half precision, and were rounded to it"
        )
    if merged:
        return "added to the float weights, which were then quantized"
    parts = [part for part in lost.values() if part]
    if not parts:
        return "exact"
    mean, most = sum(parts) / len(parts), max(parts)
    return f"{len(parts)} approximate: {mean:.0%} of an update lost on average, {most:.0%} at most"
