"""`adapt`: combine a base model and adapters trained by PEFT into a RUN folder for `fold`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from qalora_compile.cli.options import command_line, spec_of
from qalora_compile.cli.quantized import (
    add_quant_arguments,
    add_stored_argument,
    codes_of,
    print_reports,
)
from qalora_compile.cli.ui import print_summary, steps
from qalora_compile.config.choices import APPROXIMATE, MERGE, PEFT_POOLINGS, REFUSE

EXAMPLES = """examples:
  qalora-compile adapt ./Llama --adapter ./qalora-adapter --out run
  qalora-compile adapt ./Llama --adapter ./english ./polite \\
    --weights 1.0 0.5 --out run
  qalora-compile adapt ./Llama --adapter ./lora --plain approximate --out run
  qalora-compile adapt ./Llama --adapter ./lora --plain merge --bits 8 --out run
  then: qalora-compile fold run --out folded

Adapters trained with use_qalora fold exactly if their group is a multiple of
--group-size. Plain LoRA does not: --plain approximate takes the nearest
update that does, --plain merge adds it to the float weights before they are
quantized. Adapters of the QA-LoRA authors' script pool, but their settings do
not say so: add --pooling mean.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="the base: HF folder or .gguf file")
    parser.add_argument(
        "--adapter", required=True, nargs="+", metavar="DIR", help="folders of PEFT adapters"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="factor of each adapter, default 1"
    )
    parser.add_argument(
        "--plain",
        default=REFUSE,
        choices=(REFUSE, APPROXIMATE, MERGE),
        help="how to treat updates that do not fold",
    )
    parser.add_argument(
        "--pooling",
        choices=PEFT_POOLINGS,
        help="pooling of adapters whose lora_A is [r, K / g] without use_qalora in their settings",
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="folder to write")
    add_quant_arguments(parser)
    add_stored_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing RUN")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.adapt import AdaptSpec, adapt

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
            "next": command_line("fold", spec.out, "--out", "FOLDED"),
        },
    )
    return 0


def _fidelity(lost: Mapping[str, float], rounded: Sequence[str], *, merged: bool) -> str:
    """How exactly the updates were imported, as text."""
    if rounded:
        return (
            "added to the float weights, which were then quantized; "
            f"{len(rounded)} stay in half precision and were rounded to it"
        )
    if merged:
        return "added to the float weights, which were then quantized"
    parts = [part for part in lost.values() if part]
    if not parts:
        return "exact"
    mean, most = sum(parts) / len(parts), max(parts)
    return f"{len(parts)} approximate: {mean:.0%} of an update lost on average, {most:.0%} at most"
