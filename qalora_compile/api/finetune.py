"""`finetune`: train adapters of a model on data; writes a RUN folder that can be resumed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qalora_compile.api.finetune_data import data_rows, with_task
from qalora_compile.api.finetune_job import (
    FINISHED,
    INTERRUPTED,
    Job,
    is_finished,
    open_job,
    resumed_record,
)
from qalora_compile.api.finetune_spec import FinetuneSpec
from qalora_compile.api.finetune_train import Stopping, Watch, noting_failure, train
from qalora_compile.api.run_folder import read_run_file
from qalora_compile.config import AdapterSpec
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.files import reserve
from qalora_compile.ir.storage import replace_adapters
from qalora_compile.progress import say
from qalora_compile.quantizers.report import QuantReport
from qalora_compile.training.distributed import Processes, find_processes
from qalora_compile.training.evaluate import Metrics
from qalora_compile.training.fit import FitResult
from qalora_compile.training.forward.autocast import find_device
from qalora_compile.training.records.log import LOG_FILE, read_log
from qalora_compile.training.records.peft_adapters import save_peft
from qalora_compile.training.records.report_page import REPORT_FILE, check_report
from qalora_compile.training.records.trackers import check_reporting

PEFT_FOLDER = "adapter"


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """The result of a training run.

    Attributes:
        folder: The RUN folder.
        fit: The steps done, and the step whose adapters were kept.
        before, after: Held-out metrics; None without held-out data, and `after` if stopped.
        reports: The quantization error of each layer; empty if the run was resumed.
        facts: The result as table rows, as in `report.html`.
        is_first: Whether this process is the one that writes, when several train together.
    """

    folder: Path
    fit: FitResult
    before: Metrics | None
    after: Metrics | None
    reports: tuple[QuantReport, ...]
    facts: Mapping[str, object]
    is_first: bool = True


@contextmanager
def _never() -> Iterator[Callable[[], bool]]:
    """Never stops before the last step."""
    yield lambda: False


def finetune(
    spec: FinetuneSpec,
    *,
    watch: Watch = lambda report: None,
    stopping: Stopping = _never,
    processes: Processes | None = None,
) -> FinetuneResult:
    """Capture, quantize, insert adapters and train them; writes `spec.out`.

    Under a launcher such as torchrun, every process makes the same call, and the first one writes.

    Args:
        spec: The specification.
        watch: Called after each step.
        stopping: Context manager around the steps; its value is called after each step and returns
            whether to stop there.
        processes: The processes that train together; None reads them from the environment.

    Raises:
        UserInputError: a value, a file or the model is invalid; a loss is not finite; or a run is
            resumed that was started with other options or data.
        UnsupportedError: the model cannot be trained this way.
        CaptureError: the model cannot be captured.
        OutputError: the folder cannot be written.
    """
    spec = with_task(_with_origin(spec))
    spec.check_files()
    check_reporting(spec.report_to)
    processes = processes or find_processes()
    reserved = reserve(spec.out, overwrite=spec.overwrite, inputs=spec.inputs, go_on=spec.resume)
    with reserved if processes.is_first else nullcontext():
        if spec.resume:
            record = resumed_record(spec)
            if is_finished(spec, record):
                return _already_finished(spec, record, is_first=processes.is_first)
        return _finetune(spec, processes, watch, stopping)


def _with_origin(spec: FinetuneSpec) -> FinetuneSpec:
    """`spec` with the model and the task of the run that it trains on."""
    if spec.init_from is None:
        return spec
    record = read_run_file(spec.out if spec.resume else spec.init_from)
    task = (record.get("reading") or {}).get("task")
    if spec.reading.task not in (None, task):
        raise UserInputError(
            f"--task is {spec.reading.task}, and the run to train on has the task {task}",
            where=str(spec.init_from),
        )
    reading = dataclasses.replace(spec.reading, task=task)
    return dataclasses.replace(spec, model=str(record.get("model")), reading=reading)


def _already_finished(
    spec: FinetuneSpec, record: Mapping[str, Any], *, is_first: bool
) -> FinetuneResult:
    """The result of a run that has nothing left to do; nothing is loaded or written."""
    held = record.get("held_out") or {}
    before, after = (Metrics(**held[w]) if held.get(w) else None for w in ("before", "after"))
    step = int(record["step"])
    facts = {
        "model": record["model"],
        "held-out loss": _arrow(before, after, "loss"),
        "adapters of step": step,
        "status": "already finished",
    }
    fit = FitResult(losses=(), stopped=False, step=step, kept=step)
    return FinetuneResult(
        folder=spec.out,
        fit=fit,
        before=before,
        after=after,
        reports=(),
        facts=facts,
        is_first=is_first,
    )


def _finetune(
    spec: FinetuneSpec, processes: Processes, watch: Watch, stopping: Stopping
) -> FinetuneResult:
    started = time.monotonic()
    device = _device(spec, processes)
    job = open_job(spec, processes)
    spec = job.spec
    job.report_data()
    with noting_failure(job, processes), job.on(device):
        before = job.before()
    reporting = processes.is_first and _can_report()
    if reporting and "answers" not in job.record:
        job.note(answers=job.answer())
    with noting_failure(job, processes), job.on(device):
        result = train(job, processes, watch, stopping)
        after = job.evaluate(f"after step {result.kept}") if not result.stopped else None
    facts: dict[str, object] = {}
    if processes.is_first:
        _finish(job, result, after)
        _save_for_peft(job)
        facts = _facts(job, result, before, after, time.monotonic() - started)
        if reporting and not result.stopped and read_log(job.folder / LOG_FILE):
            facts["report"] = str(job.report(dict(facts), job.answer()))
        job.note(steps_done=result.step)  # everything is written: nothing is left to a resumed run
        facts["seconds"] = f"{time.monotonic() - started:.0f}"  # with answers and report
    processes.wait()
    return FinetuneResult(
        folder=spec.out,
        fit=result,
        before=before,
        after=after,
        reports=job.reports,
        facts=facts,
        is_first=processes.is_first,
    )


def _device(spec: FinetuneSpec, processes: Processes) -> torch.device:
    """The device to train on.

    Raises:
        UserInputError: no device has this name, or a launcher assigns the devices.
        UnsupportedError: the device is not available.
    """
    if spec.device is None:
        return processes.device
    if processes.count > 1:
        raise UserInputError(
            f"--device {spec.device} is given for {processes.count} processes",
            hint="leave it out: each process uses the device that its launcher assigns",
        )
    return find_device(spec.device)


def _finish(job: Job, result: FitResult, after: Metrics | None) -> None:
    """Store the trained adapters and the state of the run."""
    replace_adapters(dict(job.program.named_adapter_parameters()), job.folder)
    held_out = job.record["held_out"] | {"after": vars(after) if after else None}
    status = INTERRUPTED if result.stopped else FINISHED
    job.note(status=status, step=result.kept, held_out=held_out)


def _save_for_peft(job: Job) -> None:
    """Write the adapters in PEFT's format, if PEFT supports their kind."""
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
        say(f"note: no {PEFT_FOLDER} for PEFT: {error.what}")


def _can_report() -> bool:
    """Whether the libraries for a report are installed; prints a note if not."""
    try:
        check_report()
    except UnsupportedError as error:
        say(f"note: there will be no {REPORT_FILE}: {error.what}; {error.hint}")
        return False
    return True


def _facts(
    job: Job, result: FitResult, before: Metrics | None, after: Metrics | None, seconds: float
) -> dict[str, object]:
    """The result of the run as rows for the closing table and the report."""
    return {
        "model": job.record["model"],
        "quantized layers": len(job.program.plan.to_quantize()),
        "adapter parameters": f"{sum(p.numel() for p in job.program.adapter_parameters()):,}",
        **data_rows(job.data, job.batches),
        "cut to fit": _cut(job),
        "loss, first and last step": _ends(job),
        "held-out loss": _arrow(before, after, "loss"),
        _accuracy(job): _arrow(before, after, "exact_match", form=".1%"),
        "steps done": result.step,
        "adapters of step": result.kept,
        "status": job.record["status"],
        "seconds": f"{seconds:.0f}",
    }


def _accuracy(job: Job) -> str:
    """The name of `Metrics.exact_match` for the data of a run."""
    if job.spec.fit.learns_pairs:
        return "held-out pairs preferred"
    return "held-out accuracy" if job.data.classes else "held-out exact match"


def _cut(job: Job) -> str:
    """How many examples were longer than `--seq-len`."""
    named = [("examples", job.data)]
    if job.held_out is not None:
        named.append(("held-out examples", job.held_out))
    return ", ".join(f"{d.truncated} of {d.looked_at} {name}" for name, d in named)


def _ends(job: Job) -> str:
    losses = [row["loss"] for row in read_log(job.folder / LOG_FILE)]
    return f"{losses[0]:.4f} → {losses[-1]:.4f}" if losses else "no step was run"


def _arrow(before: Metrics | None, after: Metrics | None, field: str, form: str = ".4f") -> str:
    if before is None:
        return "no --eval-data"
    first = f"{getattr(before, field):{form}}"
    return f"{first} (before)" if after is None else f"{first} → {getattr(after, field):{form}}"
