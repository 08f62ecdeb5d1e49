"""`finetune`: capture, quantize, insert adapters, train them; writes a RUN folder."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qalora_compile.api import insert_adapters, quantize_groups
from qalora_compile.cli.data_options import (
    FORMS,
    add_data_arguments,
    arrange,
    check_trainable,
    data_rows,
    excluded,
    load_data,
    load_model,
    reading_record,
    recorded_classes,
    report_data,
)
from qalora_compile.cli.embeddings import (
    add_embedding_arguments,
    embedding_record,
    embedding_spec,
)
from qalora_compile.cli.folders import (
    CHECKPOINTS,
    TOKENIZER,
    load_run,
    load_tokenizer,
    save_description,
    save_tokenizer,
    write_run_file,
)
from qalora_compile.cli.quantized import (
    add_quant_arguments,
    add_stored_arguments,
    number_or_auto,
    print_reports,
    quant_spec,
    stored_of,
)
from qalora_compile.cli.ui import Steps, print_summary, steps
from qalora_compile.config import AUTO, CALIBRATED, INITS, POOLINGS, AdapterSpec, QuantSpec
from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_folder, check_output
from qalora_compile.ir.program import Program
from qalora_compile.ir.storage import ADAPTERS_FILE, save_tensors, write_program
from qalora_compile.quantizers.report import QuantReport, collecting_reports
from qalora_compile.training.batches import Batches
from qalora_compile.training.calibration import calibration_calls
from qalora_compile.training.checkpoint import (
    list_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from qalora_compile.training.data import Dataset, load_examples
from qalora_compile.training.evaluate import Metrics, evaluate, program_forward
from qalora_compile.training.fit import FitResult, FitSpec, StepReport, fit, make_optimizer

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
  qalora-compile finetune ./MiniLM --data reviews.jsonl --task classification --out run
  qalora-compile finetune ./SmolLM2 --data 'chats/*.jsonl' --out run --batches packed

"""
    + FORMS
)

_STATUS = ("training", "interrupted", "finished")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", metavar="MODEL", help="HF folder, .gguf file or package.mod:factory"
    )
    add_data_arguments(parser)
    parser.add_argument("--out", required=True, metavar="RUN", help="folder to write")
    quant = parser.add_argument_group("quantization")
    add_quant_arguments(quant, auto=True)
    add_stored_arguments(quant)
    add_embedding_arguments(quant)
    quant.add_argument(
        "--calibration",
        metavar="FILE",
        help="data to quantize for, JSON lines; gptq, auto and svd take the training data where "
        "none are given",
    )
    quant.add_argument(
        "--calibration-samples", type=int, default=128, metavar="N", help="the first N of them"
    )
    adapter = parser.add_argument_group("adapters")
    adapter.add_argument("--rank", type=number_or_auto, default=16, metavar="R", help="or auto")
    adapter.add_argument("--rank-budget", type=int, metavar="P", help="parameters, of --rank auto")
    adapter.add_argument(
        "--init",
        default="zeros",
        choices=INITS,
        help="svd: adapters, not refined offsets, correct what quantization lost",
    )
    adapter.add_argument("--alpha", type=float, default=32.0)
    adapter.add_argument("--pooling", default="sum", choices=POOLINGS)
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=100)
    training.add_argument("--batch-size", type=int, default=8, metavar="B")
    training.add_argument("--seq-len", type=int, default=512, metavar="T", help="longest example")
    training.add_argument("--lr", type=float, default=1e-3, metavar="F")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument(
        "--save-every", type=int, default=50, metavar="N", help="checkpoint steps"
    )
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing RUN")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    started = time.monotonic()
    spec = FitSpec(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        seed=options.seed,
    )
    out = Path(options.out)
    with steps() as shown:
        job = _resume(options, spec, out) if options.resume else _start(options, spec, out, shown)
        job.report_data(shown)
        before = job.evaluate()
        result = _train(job, options, shown)
        after = job.evaluate() if not result.stopped else None
    _finish(job, result, before, after)
    rows: dict[str, object] = {
        "model": job.record["model"],
        "quantized layers": len(job.program.plan.to_quantize()),
        "adapter parameters": sum(p.numel() for p in job.program.adapter_parameters()),
        **data_rows(job.data, job.batches),
        "loss, first and last step": _ends(result),
        "held-out loss": _arrow(before, after, "loss"),
        "held-out accuracy" if job.data.classes else "held-out exact match": _arrow(
            before, after, "exact_match"
        ),
        "status": job.record["status"],
        "seconds": f"{time.monotonic() - started:.0f}",
        "written": str(out),
        "next": f"qalora-compile fold {out} --out FOLDED"
        if not result.stopped
        else "the same command with --resume",
    }
    if job.reports:
        print_reports(job.reports)
    print_summary("finetune", rows)
    return 130 if result.stopped else 0


@dataclass
class _Job:
    """Everything that a started or resumed run works with."""

    program: Program
    trained: Program
    data: Dataset
    batches: Batches
    held_out: Dataset | None
    spec: FitSpec
    folder: Path
    record: dict[str, Any]
    start_step: int
    optimizer: torch.optim.Optimizer
    reports: tuple[QuantReport, ...] = ()

    def report_data(self, shown: Steps) -> None:
        """Say what of the data was cut or skipped."""
        for note in self.program.notes:
            shown.say(f"note: {note}")
        for name, data in (("data", self.data), ("held-out data", self.held_out)):
            if data is not None:
                report_data(shown, name, data)

    def evaluate(self) -> Metrics | None:
        """Held-out metrics, where held-out data was given."""
        if self.held_out is None:
            return None
        return evaluate(program_forward(self.program.eval()), self.held_out.examples)


def _start(options: argparse.Namespace, spec: FitSpec, out: Path, shown: Steps) -> _Job:
    """Load, read the data, quantize, insert; write the RUN folder that training goes on in."""
    check_output(out, overwrite=options.overwrite)
    quant, adapter = _specs(options)
    embeddings = embedding_spec(options)
    shown.say(f"load {options.model}")
    source, classes = load_model(options)
    data, held_out = load_data(options, source.tokenizer, source.decoder_start, classes)
    shown.say("capture")
    captured = source.capture()
    check_trainable(captured, classes, data, held_out)
    calls = _calibration(options, captured, data, source.tokenizer)
    with collecting_reports() as reports:
        program = quantize_groups(
            captured,
            quant,
            targets=options.targets or "all-linear",
            exclude=excluded(options, source),
            embeddings=embeddings,
            calibration=calls if _quantizes_by_data(options) else None,
            stored=stored_of(options, source),
        )
    program = insert_adapters(
        program, adapter, source=captured, calibration=calls, train=source.head
    )
    trained, batches = arrange(options, program, data, source.model)
    record = {
        "model": options.model,
        "data": [str(Path(file.path).resolve()) for file in data.files],
        "reading": reading_record(options, classes),
        "quant": quant.to_json(),
        "adapter": adapter.to_json(),
        "fit": spec.to_json(),
        "examples": len(data.examples),
        "decoder_start": source.decoder_start,
        "status": _STATUS[0],
        "step": 0,
    } | embedding_record(embeddings)
    with atomic_folder(out, overwrite=options.overwrite) as folder:
        write_program(program, folder)
        save_tokenizer(source.tokenizer, folder)
        save_description(source.model, folder)
        write_run_file(folder, record)
    optimizer = make_optimizer(program, spec)
    parts = (program, trained, data, batches, held_out, spec, out, record)
    return _Job(*parts, 0, optimizer, tuple(reports))


def _calibration(
    options: argparse.Namespace, program: Program, data: Dataset, tokenizer: Any
) -> list[dict[str, Any]] | None:
    """Calls to quantize and to start for, where a file of them is given or an option needs them."""
    if options.calibration:
        data = load_examples(
            options.calibration,
            tokenizer,
            max_length=options.seq_len,
            classes=data.classes or None,
        )
        check_trainable(program, data.classes, data)
    elif not (_quantizes_by_data(options) or options.rank == AUTO or options.init == "svd"):
        return None
    return calibration_calls(program, data.examples, options.calibration_samples)


def _quantizes_by_data(options: argparse.Namespace) -> bool:
    needed = options.method in CALIBRATED or options.bits == AUTO
    return needed or options.calibration is not None


def _specs(options: argparse.Namespace) -> tuple[QuantSpec, AdapterSpec]:
    """What to quantize and what to adapt.

    Raises:
        UserInputError: a value is out of range, or fits no other.
    """
    quant = quant_spec(
        options,
        budget=options.budget,
        budget_unit=options.budget_unit,
        refine_offsets=options.init != "svd",  # else nothing would be left for the adapters
    )
    adapter = AdapterSpec(
        rank=options.rank,
        alpha=options.alpha,
        pooling=options.pooling,
        seed=options.seed,
        init=options.init,
        rank_budget=options.rank_budget,
    )
    return quant, adapter


def _resume(options: argparse.Namespace, spec: FitSpec, out: Path) -> _Job:
    """Open a RUN folder and restore its last checkpoint.

    Raises:
        UserInputError: the folder was made with other training options, which are named.
    """
    program, record = load_run(out)
    for name, value in spec.to_json().items():
        if record["fit"].get(name) != value:
            raise UserInputError(
                f"the run was started with {name}={record['fit'].get(name)}, not {value}",
                where=str(out),
                hint="give the options of the first call, or start a new run",
            )
    tokenizer, classes = load_tokenizer(out / TOKENIZER), recorded_classes(options, record)
    data, held_out = load_data(options, tokenizer, record.get("decoder_start"), classes)
    if len(data.examples) != record["examples"]:
        raise UserInputError(
            f"the run was started on {record['examples']} examples, the data now has "
            f"{len(data.examples)}",
            where=", ".join(options.data),
            hint="give the files of the first call, or start a new run",
        )
    check_trainable(program, classes, data, held_out)
    trained, batches = arrange(options, program, data, out)
    optimizer = make_optimizer(program, spec)
    checkpoints = list_checkpoints(out / CHECKPOINTS)
    step = 0
    if checkpoints:
        restore_checkpoint(checkpoints[-1], program, optimizer, seed=spec.seed)
        step = checkpoints[-1].step
    return _Job(program, trained, data, batches, held_out, spec, out, record, step, optimizer)


def _train(job: _Job, options: argparse.Namespace, shown: Steps) -> FitResult:
    with _interruptible() as interrupted:
        shown.update("train", job.start_step, job.spec.steps)

        def on_step(report: StepReport, optimizer: torch.optim.Optimizer) -> bool:
            shown.update("train", report.step, job.spec.steps, f"loss {report.loss:.4f}")
            job.record["step"] = report.step
            last = report.step == job.spec.steps
            if interrupted() or last or report.step % options.save_every == 0:
                save_checkpoint(
                    job.folder / CHECKPOINTS,
                    job.program,
                    optimizer,
                    step=report.step,
                    seed=job.spec.seed,
                )
            return interrupted() and not last

        return fit(
            job.trained,
            job.batches,
            job.spec,
            optimizer=job.optimizer,
            start_step=job.start_step,
            on_step=on_step,
        )


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Let the first Ctrl-C finish the running step and save; a second one stops at once."""
    hits: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if hits:
            raise KeyboardInterrupt
        hits.append(number)

    old = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(hits)
    finally:
        signal.signal(signal.SIGINT, old)


def _finish(job: _Job, result: FitResult, before: Metrics | None, after: Metrics | None) -> None:
    """Store the trained adapters and the state of the run."""
    save_tensors(dict(job.program.named_adapter_parameters()), job.folder / ADAPTERS_FILE)
    job.record["status"] = _STATUS[1] if result.stopped else _STATUS[2]
    earlier = job.record.get("losses", [])[: job.start_step]
    job.record["losses"] = [*earlier, *result.losses]
    job.record["held_out"] = {
        name: None if metrics is None else vars(metrics)
        for name, metrics in (("before", before), ("after", after))
    }
    write_run_file(job.folder, {k: v for k, v in job.record.items() if k not in _WRITTEN})


_WRITTEN = ("format", "version", "versions")


def _ends(result: FitResult) -> str:
    if not result.losses:
        return "no step was run"
    return f"{result.losses[0]:.4f} → {result.losses[-1]:.4f}"


def _arrow(before: Metrics | None, after: Metrics | None, field: str) -> str:
    if before is None or after is None:
        return "no --eval-data" if before is None else f"{getattr(before, field):.4f} (before)"
    return f"{getattr(before, field):.4f} → {getattr(after, field):.4f}"
