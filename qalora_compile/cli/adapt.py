"""`adapt`: a base model and adapters that PEFT has trained; writes a RUN folder for `fold`."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from qalora_compile.api import quantize_groups
from qalora_compile.capture.load_source import Source, load_source
from qalora_compile.capture.peft_adapters import (
    POOLINGS,
    PeftAdapter,
    as_pooled,
    merge_,
    put_saved_,
    read_peft_adapter,
)
from qalora_compile.cli.folders import MODEL, save_description, save_tokenizer, write_run_file
from qalora_compile.cli.pooling import keep_pooling
from qalora_compile.cli.quantized import (
    add_quant_arguments,
    add_stored_argument,
    print_reports,
    quant_spec,
    stored_codes,
)
from qalora_compile.cli.ui import Steps, print_summary, steps
from qalora_compile.config import QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_folder, reserve
from qalora_compile.ir.checkpoint_codes import CheckpointCodes
from qalora_compile.ir.end_tokens import ends_to_json
from qalora_compile.ir.finite import check_program
from qalora_compile.ir.lora_update import LowRankUpdate
from qalora_compile.ir.program import Program
from qalora_compile.ir.storage import write_program
from qalora_compile.passes.analysis.select_sites import ALL_LINEAR
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.canonicalize.canonical_passes import canonical_passes
from qalora_compile.passes.framework.pipeline import Pipeline
from qalora_compile.passes.recipes.import_lora import Updates, import_lora, losses
from qalora_compile.quantizers import needs_data
from qalora_compile.quantizers.report import collecting_reports

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
REFUSE, APPROXIMATE, MERGE = "refuse", "approximate", "merge"


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
    inputs = [options.model, *options.adapter]
    with reserve(Path(options.out), overwrite=options.overwrite, inputs=inputs):
        return _adapt(options)


def _adapt(options: argparse.Namespace) -> int:
    started = time.monotonic()
    out = Path(options.out)
    quant = quant_spec(options)
    if needs_data(quant.method):
        raise UserInputError(
            f"the method {quant.method} needs calibration data, which adapt does not take",
            hint="use --method hqq",
        )
    adapters = _read(options)
    with steps() as shown, collecting_reports() as reports:
        shown.say(f"load {options.model}")
        source = load_source(options.model, zero_points=options.stored_zero_points)
        adapters = [as_pooled(each, source.model, options.pooling) for each in adapters]
        saved = put_saved_(source.model, adapters)
        stored = _stored(options, source, shown)
        program, lost, rounded = _adapted(options, source, _together(adapters), quant, stored)
        record = {
            "model": options.model,
            "quant": quant.to_json(),
            "adapter": {
                "peft": [str(Path(folder).resolve()) for folder in options.adapter],
                "weights": _weights(options),
                "plain": options.plain,
                "pooling": options.pooling,
                "lost": {path: part for path, part in lost.items() if part},
            },
            "status": "finished",
            "step": 0,
        }
        check_program(program)
        with atomic_folder(out, overwrite=options.overwrite) as folder:
            write_program(program, folder)
            save_tokenizer(source.tokenizer, folder)
            ends = save_description(
                source.model,
                folder,
                Path(source.reference) if source.kind == "gguf" else None,
                tokenizer=source.tokenizer,
            )
            keep_pooling(Path(options.model), folder / MODEL)
            write_run_file(folder, record | {"ends": ends_to_json(ends)})
    print_reports(reports)
    print_summary(
        "adapt",
        {
            "model": options.model,
            "trained on": ", ".join(dict.fromkeys(a.base or "not said" for a in adapters)),
            "quantized layers": len(program.plan.to_quantize()),
            "adapted layers": len(_together(adapters)),
            "updates": _fidelity(lost, rounded, merged=options.plain == MERGE),
            "whole parameters put in": len(saved),
            "seconds": f"{time.monotonic() - started:.0f}",
            "written": str(out),
            "next": f"qalora-compile fold {out} --out FOLDED",
        },
    )
    return 0


def _stored(options: argparse.Namespace, source: Source, shown: Steps) -> CheckpointCodes | None:
    """The codes to keep, after the reader's notes; none where merging changes the weights."""
    codes = stored_codes(options, source, shown)
    if options.plain != MERGE or codes is None:
        return codes
    shown.say(
        f"note: the {len(codes)} quantized tensors of {source.reference} are quantized anew, since "
        "--plain merge changes their weights"
    )
    return None


def _adapted(
    options: argparse.Namespace,
    source: Source,
    updates: Updates,
    quant: QuantSpec,
    stored: CheckpointCodes | None,
) -> tuple[Program, dict[str, float], tuple[str, ...]]:
    """The program with its adapters, what of each update was lost, and weights that were rounded.

    An update that is merged into a weight in half precision is rounded with it, unless the weight
    is quantized: that is done from the sum in float32.
    """
    wide = merge_(source.model, updates) if options.plain == MERGE else {}
    updates = {} if options.plain == MERGE else updates
    targets = tuple(options.targets) if options.targets else ALL_LINEAR
    annotate = AnnotateLinears(targets=targets, exclude=tuple(options.exclude))
    annotated = Pipeline([*canonical_passes(), annotate])(source.capture()).program
    on_codes = {site.weight for site in annotated.plan.weights_to_quantize()}
    tensors = annotated.tensors() | {
        name: nn.Parameter(values, requires_grad=False)
        for name, values in wide.items()
        if name in on_codes
    }
    annotated = annotated.evolve(graph=annotated.copy_graph(), tensors=tensors)
    program = quantize_groups(annotated, quant, stored=stored)
    approximate = options.plain == APPROXIMATE
    adapted = import_lora(program, updates, approximate=approximate)
    return adapted, losses(program, updates), tuple(wide.keys() - on_codes)


def _together(adapters: Sequence[PeftAdapter]) -> Updates:
    """The updates of each layer, of all adapters."""
    found: dict[str, list[LowRankUpdate]] = defaultdict(list)
    for adapter in adapters:
        for path, update in adapter.updates.items():
            found[path].append(update)
    return found


def _weights(options: argparse.Namespace) -> list[float]:
    """The weight of each adapter.

    Raises:
        UserInputError: there are more or fewer than adapters.
    """
    if options.weights is None:
        return [1.0] * len(options.adapter)
    if len(options.weights) != len(options.adapter):
        raise UserInputError(
            f"there are {len(options.weights)} weights for {len(options.adapter)} adapters",
            hint="give one for each",
        )
    weights: list[float] = options.weights
    return weights


def _read(options: argparse.Namespace) -> list[PeftAdapter]:
    pairs = zip(options.adapter, _weights(options), strict=True)
    return [read_peft_adapter(folder, weight=weight) for folder, weight in pairs]


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
