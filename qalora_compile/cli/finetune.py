"""`finetune`: capture, quantize, insert adapters, train them; writes a RUN folder."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from qalora_compile.cli.data_options import FORMS, add_data_arguments, data_rows, find_task
from qalora_compile.cli.finetune_job import FINISHED, INTERRUPTED, Job, open_job
from qalora_compile.cli.finetune_train import noting_failure, train
from qalora_compile.cli.quantized import add_embedding_arguments, add_quant_arguments, print_reports
from qalora_compile.cli.training_options import (
    add_adapter_arguments,
    add_training_arguments,
    device_of,
    fit_spec,
)
from qalora_compile.cli.ui import Steps, print_summary, quiet, steps
from qalora_compile.config import AdapterSpec
from qalora_compile.errors import UnsupportedError
from qalora_compile.files import reserve
from qalora_compile.ir.storage import replace_adapters
from qalora_compile.training.distributed import Processes, find_processes
from qalora_compile.training.evaluate import Metrics
from qalora_compile.training.fit import FitResult
from qalora_compile.training.records.log import LOG_FILE, check_reporting, read_log
from qalora_compile.training.records.peft_adapters import save_peft
from qalora_compile.training.records.report_page import REPORT_FILE, check_report
from qalora_compile.training.spec import FitSpec

PEFT_FOLDER = "adapter"
NAME = "finetune"
SUMMARY = "train adapters on a model's own quantized weights; writes a RUN folder"
EXAMPLES = (
    """examples:
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run
  qalora-compile finetune model.gguf --data train.jsonl --eval-data test.jsonl --steps 200 --out run
  qalora-compile finetune my_package.models:build --data ids.jsonl --bits 3 --out run
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run --embeddings 8
  qalora-compile finetune ./SmolLM2 --data train.jsonl --bits 3 --method gptq --out run
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run --resume
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run --bits 3 --init svd
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run --bits auto --budget 3.5
  qalora-compile finetune ./SmolLM2 --data train.jsonl --out run --rank auto --rank-budget 1000000
  qalora-compile finetune ./SmolLM2 --data train.jsonl --eval-data test.jsonl --out run \\
    --eval-every 20 --patience 3 --report-to tensorboard
  torchrun --nproc-per-node 2 -m qalora_compile finetune ./SmolLM2 --data train.jsonl --out run
  qalora-compile finetune ./MiniLM --data reviews.jsonl --out run             labels: a new head
  qalora-compile finetune ./SmolLM2 --data qa.csv --map prompt=question,completion=answer --out run
  qalora-compile finetune ./SmolLM2 --data 'chats/*.jsonl' --out run --batches packed

"""
    + FORMS
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", metavar="MODEL", help="HF folder, .gguf file or package.mod:factory"
    )
    add_data_arguments(parser)
    parser.add_argument("--out", required=True, metavar="RUN", help="folder to write")
    quant = parser.add_argument_group("quantization")
    add_quant_arguments(quant, auto=True)
    add_embedding_arguments(quant)
    quant.add_argument(
        "--calibration",
        metavar="FILE",
        help="data to quantize for; gptq, auto and svd take the training data where none are given",
    )
    quant.add_argument(
        "--calibration-samples", type=int, default=128, metavar="N", help="the first N of them"
    )
    add_adapter_arguments(parser.add_argument_group("adapters"))
    add_training_arguments(parser.add_argument_group("training"))
    parser.add_argument("--overwrite", action="store_true", help="replace an existing RUN")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    spec = fit_spec(options)
    find_task(options)
    check_reporting(options.report_to)
    processes = find_processes()
    if not processes.is_first:
        return _finetune(options, spec, processes)
    inputs = [options.model, *options.data, *(options.eval_data or ()), options.calibration]
    with reserve(
        Path(options.out), overwrite=options.overwrite, inputs=inputs, go_on=options.resume
    ):
        return _finetune(options, spec, processes)


def _finetune(options: argparse.Namespace, spec: FitSpec, processes: Processes) -> int:
    started = time.monotonic()
    device = device_of(options, processes)
    with steps() if processes.is_first else quiet() as shown:
        job = open_job(options, spec, shown, processes)
        job.report_data(shown)
        with noting_failure(job, processes), job.on(device):
            before = job.before()
        reporting = processes.is_first and _can_report(shown)
        if reporting and "answers" not in job.record:
            job.note(answers=job.answer())
        with noting_failure(job, processes), job.on(device):
            result, code = train(job, options, shown, processes)
            after = job.evaluate(f"after step {result.kept}") if not result.stopped else None
        if processes.is_first:
            _finish(job, result, after)
            _save_for_peft(job, shown)
            rows = _summary(job, result, before, after, time.monotonic() - started)
            if reporting and read_log(job.folder / LOG_FILE):
                rows["report"] = str(job.report(dict(rows), job.answer()))
    if processes.is_first:
        if job.reports:
            print_reports(job.reports)
        print_summary("finetune", rows | _next(job, result))
    processes.wait()
    return code


def _finish(job: Job, result: FitResult, after: Metrics | None) -> None:
    """Store the trained adapters and the state of the run."""
    replace_adapters(dict(job.program.named_adapter_parameters()), job.folder)
    held_out = job.record["held_out"] | {"after": vars(after) if after else None}
    status = INTERRUPTED if result.stopped else FINISHED
    job.note(status=status, step=result.kept, held_out=held_out)


def _save_for_peft(job: Job, shown: Steps) -> None:
    """Write the adapters alone as PEFT reads them, where it has such adapters."""
    spec = AdapterSpec.from_json(job.record["adapter"])
    try:
        save_peft(
            job.program,
            job.folder / PEFT_FOLDER,
            pooling=spec.pooling,
            base_model=job.record["model"],
            dropout=spec.dropout,
            overwrite=True,
        )
    except UnsupportedError as error:
        shown.say(f"note: no {PEFT_FOLDER} for PEFT: {error.what}")


def _can_report(shown: Steps) -> bool:
    """Whether the libraries for a report are there; says so where not."""
    try:
        check_report()
    except UnsupportedError as error:
        shown.say(f"note: there will be no {REPORT_FILE}: {error.what}; {error.hint}")
        return False
    return True


def _summary(
    job: Job, result: FitResult, before: Metrics | None, after: Metrics | None, seconds: float
) -> dict[str, object]:
    """What the closing table and the report say."""
    return {
        "model": job.record["model"],
        "quantized layers": len(job.program.plan.to_quantize()),
        "adapter parameters": sum(p.numel() for p in job.program.adapter_parameters()),
        **data_rows(job.data, job.batches),
        "cut to fit": _cut(job),
        "loss, first and last step": _ends(job),
        "held-out loss": _arrow(before, after, "loss"),
        "held-out accuracy" if job.data.classes else "held-out exact match": _arrow(
            before, after, "exact_match"
        ),
        "steps done": result.step,
        "adapters of step": result.kept,
        "status": job.record["status"],
        "seconds": f"{seconds:.0f}",
    }


def _cut(job: Job) -> str:
    """How many examples were longer than `--seq-len`."""
    named = [("examples", job.data)]
    if job.held_out is not None:
        named.append(("held-out examples", job.held_out))
    return ", ".join(f"{d.truncated} of {d.looked_at} {name}" for name, d in named)


def _next(job: Job, result: FitResult) -> dict[str, object]:
    go_on = "the same command with --resume"
    fold = f"qalora-compile fold {job.folder} --out FOLDED"
    return {"written": str(job.folder), "next": go_on if result.stopped else fold}


def _ends(job: Job) -> str:
    losses = [row["loss"] for row in read_log(job.folder / LOG_FILE)]
    return f"{losses[0]:.4f} → {losses[-1]:.4f}" if losses else "no step was run"


def _arrow(before: Metrics | None, after: Metrics | None, field: str) -> str:
    if before is None or after is None:
        return "no --eval-data" if before is None else f"{getattr(before, field):.4f} (before)"
    return f"{getattr(before, field):.4f} → {getattr(after, field):.4f}"
