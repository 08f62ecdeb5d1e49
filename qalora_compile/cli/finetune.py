"""`finetune`: capture, quantize, insert adapters, train them; writes a RUN folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_compile.cli.data_options import FORMS, add_data_arguments, reading_of
from qalora_compile.cli.options import command_line, spec_of
from qalora_compile.cli.quantized import (
    add_calibration_arguments,
    add_embedding_arguments,
    add_quant_arguments,
    codes_of,
    print_reports,
)
from qalora_compile.cli.signals import Stop, stopping
from qalora_compile.cli.training_options import (
    adapter_spec,
    add_adapter_arguments,
    add_training_arguments,
    fit_spec,
)
from qalora_compile.cli.training_view import View
from qalora_compile.cli.ui import print_summary, quiet, remark, steps

if TYPE_CHECKING:
    from qalora_compile.api.finetune import FinetuneResult
    from qalora_compile.api.finetune_spec import FinetuneSpec
    from qalora_compile.training.fit import StepReport

EXAMPLES = (
    """examples:
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run
  qalora-compile finetune model.gguf --data train.jsonl \\
    --eval-data test.jsonl --steps 200 --out run
  qalora-compile finetune my_package.models:build --data ids.jsonl \\
    --bits 3 --out run
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run --embeddings 8
  qalora-compile finetune ./SmolLM2 --data train.jsonl --bits 3 \\
    --method gptq --out run
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run --epochs 3
  # after an interruption
  qalora-compile finetune --resume --out run
  qalora-compile finetune --init-from run --data more.jsonl --out run2
  qalora-compile finetune --config run/run.yaml --lr 5e-4 --out run3
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run --bits 3 \\
    --init svd
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run \\
    --bits auto --budget 3.5
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run \\
    --rank auto --rank-budget 1000000
  qalora-compile finetune ./SmolLM2 --data train.jsonl \\
    --eval-data test.jsonl --out run \\
    --eval-every 20 --patience 3 --report-to tensorboard
  torchrun --nproc-per-node 2 -m qalora_compile finetune ./SmolLM2 \\
    --data train.jsonl --out run
  qalora-compile finetune ./SmolLM2 --data pairs.jsonl --loss dpo \\
    --lr 1e-4 --out run
  # classification
  qalora-compile finetune ./MiniLM --data reviews.jsonl --out run
  # images with labels, read by the model's own processor
  qalora-compile finetune ./vit --data images.jsonl --out run
  qalora-compile finetune ./SmolLM2 --data qa.csv \\
    --map prompt=question,completion=answer --out run
  qalora-compile finetune ./SmolLM2 --data 'chats/*.jsonl' --out run \\
    --batches packed

"""
    + FORMS
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="HF folder, .gguf file or package.mod:factory"
    )
    add_data_arguments(parser)
    parser.add_argument("--out", required=True, metavar="RUN", help="folder to write")
    parser.add_argument(
        "--init-from",
        metavar="RUN",
        help="in place of MODEL: train on from the adapters of this run, in a new RUN (default: "
        "begin with MODEL)",
    )
    quant = parser.add_argument_group("quantization")
    add_quant_arguments(quant, auto=True)
    add_embedding_arguments(quant)
    add_calibration_arguments(
        quant, otherwise="by default, gptq, learned, auto and svd use the training data"
    )
    add_adapter_arguments(parser.add_argument_group("adapters"))
    add_training_arguments(parser.add_argument_group("training"))
    parser.add_argument("--overwrite", action="store_true", help="replace an existing RUN")


def finetune_spec(options: argparse.Namespace) -> FinetuneSpec:
    """The specification in the options.

    Raises:
        UserInputError: a value is out of range, or options conflict.
    """
    from qalora_compile.api.finetune_spec import FinetuneSpec

    return spec_of(
        FinetuneSpec,
        options,
        model=options.model or "",
        out=Path(options.out),
        init_from=Path(options.init_from) if options.init_from else None,
        fit=fit_spec(options),
        adapter=adapter_spec(options),
        codes=codes_of(options),
        reading=reading_of(options),
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from qalora_compile.api.finetune import finetune
    from qalora_compile.training.distributed import find_processes

    spec, stop, processes = finetune_spec(options), Stop(), find_processes()
    with steps() if processes.is_first else quiet() as shown:
        view = View(shown)

        def watch(report: StepReport) -> None:
            stop.step = report.step
            view.show(report)

        try:
            result = finetune(
                spec, watch=watch, stopping=lambda: stopping(stop), processes=processes
            )
        except KeyboardInterrupt:
            if stop.number is not None and processes.is_first:
                remark(f"not saved after the last checkpoint; to go on: {_resume(spec.out)}")
            raise
    if result.is_first:
        if result.reports:
            print_reports(result.reports)
        print_summary("finetune", dict(result.facts) | _next(result))
    return stop.exit_code if result.fit.stopped else 0


def _resume(out: Path) -> str:
    return command_line("finetune", "--resume", "--out", out)


def _next(result: FinetuneResult) -> dict[str, object]:
    fold = command_line("fold", result.folder, "--out", "FOLDED")
    go_on = _resume(result.folder) + " (under the launcher of the first call, if there was one)"
    return {"written": str(result.folder), "next": go_on if result.fit.stopped else fold}
