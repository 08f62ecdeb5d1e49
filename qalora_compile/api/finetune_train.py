"""The training loop of `finetune`: checkpoints, stopping and logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from qalora_compile.api.finetune_job import FAILED, Job
from qalora_compile.api.finetune_start import TRAINING
from qalora_compile.errors import UserInputError
from qalora_compile.progress import announce
from qalora_compile.training.distributed import Processes
from qalora_compile.training.fit import FitResult, FitState, StepReport, fit
from qalora_compile.training.records.log import LOG_FILE, JsonLog, Recorder
from qalora_compile.training.records.trackers import open_recorders

Watch = Callable[[StepReport], None]
"""Called after each step."""
Stopping = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""Context manager around the steps; its value returns after each step whether to stop there."""


def train(job: Job, processes: Processes, watch: Watch, stopping: Stopping) -> FitResult:
    """Train, and save every `save_every` steps, at the end and when stopped.

    Raises:
        UserInputError: a loss is not finite. The adapters on disk are those of the last
            checkpoint, whose loss was finite.
    """
    spec = job.spec
    announce("train", job.state.step, spec.fit.steps)
    with stopping() as stop, _recorders(job, processes) as recorders:

        def on_step(report: StepReport, state: FitState) -> bool:
            for recorder in recorders:
                recorder.record(report)
            watch(report)
            return stop() and not state.is_over(spec.fit)

        def on_good(state: FitState, last: bool) -> None:
            if processes.is_first and (last or state.step % spec.save_every == 0):
                job.save()

        if processes.is_first:
            job.record.pop("problem", None)
            job.note(status=TRAINING)
        return fit(
            job.trained,
            job.batches,
            spec.fit,
            state=job.state,
            held_out=job.held_out.examples if job.held_out else (),
            on_step=on_step,
            on_good=on_good,
            processes=processes,
        )


@contextmanager
def noting_failure(job: Job, processes: Processes) -> Iterator[None]:
    """Record an exception of the block in `run.json`."""
    try:
        yield
    except UserInputError as error:
        if processes.is_first:
            job.note(status=FAILED, problem=error.what)
        raise


@contextmanager
def _recorders(job: Job, processes: Processes) -> Iterator[list[Recorder]]:
    """The logs of the steps; only the first process writes them."""
    recorders: list[Recorder] = []
    try:
        if processes.is_first:
            recorders.append(JsonLog(job.folder / LOG_FILE, job.state.step))
            spec, step = job.spec, job.state.step
            recorders.extend(open_recorders(spec.report_to, job.folder, step, spec.options()))
        yield recorders
    finally:
        for recorder in recorders:
            recorder.close()
