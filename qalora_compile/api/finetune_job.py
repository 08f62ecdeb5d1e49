"""The state of a `finetune` run: starting a new run, or opening one to resume it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from qalora_compile.api.finetune_data import report_data
from qalora_compile.api.finetune_spec import FinetuneSpec
from qalora_compile.api.finetune_start import reopen, start
from qalora_compile.api.run_folder import CHECKPOINTS, TOKENIZER, read_run_file, write_run_file
from qalora_compile.api.settings import facts_of_report, settings_of, written_by
from qalora_compile.errors import UserInputError
from qalora_compile.ir.program import Program
from qalora_compile.ir.storage import replace_adapters
from qalora_compile.progress import say
from qalora_compile.quantizers.report import QuantReport
from qalora_compile.training.data.batches import Batches
from qalora_compile.training.data.dataset import Dataset
from qalora_compile.training.data.example import Example
from qalora_compile.training.distributed import Processes
from qalora_compile.training.evaluate import Metrics
from qalora_compile.training.fit import FitState
from qalora_compile.training.forward.align_tensors import align_tensors
from qalora_compile.training.losses import held_out_metrics
from qalora_compile.training.records.checkpoint import (
    list_checkpoints,
    remove_unfinished,
    restore_checkpoint,
    save_checkpoint,
)
from qalora_compile.training.records.log import LOG_FILE, read_log
from qalora_compile.training.records.report_page import (
    REPORT_FILE,
    Sample,
    layer_changes,
    write_report,
)
from qalora_compile.training.records.run_identity import Identity
from qalora_compile.training.sample_answers import answers, questions
from qalora_compile.untrusted.media_processor import load_preprocessor

INTERRUPTED, FINISHED, FAILED = "interrupted", "finished", "failed"
_ASKED = 6
"""Number of examples whose answers the report shows."""
_WRITTEN = ("format", "version", "versions")


@dataclass
class Job:
    """Everything that a new or resumed run works with.

    `trained` is the form of `program` that takes the batches; both share their parameters.
    """

    program: Program
    trained: Program
    data: Dataset
    batches: Batches
    held_out: Dataset | None
    spec: FinetuneSpec
    record: dict[str, Any]
    state: FitState
    identity: Identity
    reports: tuple[QuantReport, ...] = ()

    @property
    def folder(self) -> Path:
        """The RUN folder."""
        return self.spec.out

    def report_data(self) -> None:
        """Print how much of the data was cut or skipped."""
        for note in self.program.notes:
            say(f"note: {note}")
        for name, data in (("data", self.data), ("held-out data", self.held_out)):
            if data is not None:
                report_data(name, data)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Move both forms of the program to a device in the block, and back to the CPU after it."""
        forms = (self.program, self.trained)
        for form in forms:
            form.to(device)
        try:
            yield
        finally:
            for form in forms:
                form.to("cpu")

    def before(self) -> Metrics | None:
        """Held-out metrics before training; a resumed run reads them from its record.

        Raises:
            UserInputError: the loss is not finite.
        """
        if "held_out" not in self.record:
            found = self.evaluate("before training")
            self.record["held_out"] = {"before": vars(found) if found else None, "after": None}
        stored = self.record["held_out"]["before"]
        return Metrics(**stored) if stored else None

    def evaluate(self, when: str) -> Metrics | None:
        """Held-out metrics; None if no held-out data was given.

        Raises:
            UserInputError: the loss is not finite; the message contains `when`.
        """
        if self.held_out is None:
            return None
        found = held_out_metrics(
            self.program.eval(), self.held_out.examples, self.spec.fit, self.state.reference
        )
        found.check(when)
        return found

    def answer(self) -> list[str]:
        """The model's answers to the first held-out examples, or else training examples."""
        return answers(self.program, self._asked(), self._tokenizer(), self.data.classes)

    def report(self, facts: Mapping[str, object], answered: list[str]) -> Path:
        """Write `report.html`; the answers before training come from the record."""
        asked = questions(self._asked(), self._tokenizer(), self.data.classes)
        before = self.record["answers"]
        path = self.folder / REPORT_FILE
        inputs, results = facts_of_report(facts)
        write_report(
            path,
            read_log(self.folder / LOG_FILE),
            layer_changes(self.program),
            title=f"Training of {Path(self.record['model']).name}",
            settings=inputs | settings_of(self.record) | written_by(self.record),
            results=results,
            samples=[Sample(*row) for row in zip(asked, before, answered, strict=True)],
            classifies=bool(self.data.classes),
            unit=self.data.unit,
        )
        return path

    def _asked(self) -> list[Example]:
        return list((self.held_out or self.data).examples[:_ASKED])

    def _tokenizer(self) -> Any:
        return load_preprocessor(self.folder / TOKENIZER)

    def save(self) -> None:
        """Write a checkpoint, and the adapters that a fold would use now."""
        folder = self.folder / CHECKPOINTS
        save_checkpoint(folder, self.program, self.state, self.identity, keep=self.spec.keep)
        best = self.state.best
        adapters = best.adapters if best else dict(self.program.named_adapter_parameters())
        replace_adapters(adapters, self.folder)
        self.note(step=best.step if best else self.state.step)

    def note(self, **facts: Any) -> None:
        """Write facts into `run.json`."""
        self.record |= facts
        rest = {k: v for k, v in self.record.items() if k not in _WRITTEN}
        write_run_file(self.folder, rest)


def open_job(spec: FinetuneSpec, processes: Processes) -> Job:
    """Start a run or, with `spec.resume`, restore its last checkpoint.

    Only the first process starts it; the others open the folder that it has written.

    Raises:
        UserInputError: the folder to resume was not written by `finetune`.
    """
    begun = None
    if not spec.resume:
        begun = start(spec, processes.count) if processes.is_first else None
        processes.wait()
    record = read_run_file(spec.out)
    begun = begun or reopen(spec, record, processes.count)
    align_tensors(begun.program)  # figures before training are of the same arithmetic
    spec = begun.spec
    if spec.resume:
        record |= {"fit": spec.fit.to_json(), "options": record["options"] | spec.length()}
    identity = Identity.of(begun.program, spec.fit, data=str(record["options"]["data"]))
    state = FitState.fresh(begun.program, spec.fit)
    if spec.resume:
        _restore(spec.out / CHECKPOINTS, begun.program, state, identity, processes)
        say(f"goes on after step {state.step} of {spec.fit.steps}")
    return Job(
        **{f.name: getattr(begun, f.name) for f in fields(begun)},
        record=record,
        state=state,
        identity=identity,
    )


def resumed_record(spec: FinetuneSpec) -> dict[str, Any]:
    """The record of the run that is resumed, which was started with the same options and data.

    Raises:
        UserInputError: the folder is no run, or was made with others; the first one is named.
    """
    record = read_run_file(spec.out)
    if "options" not in record:
        raise UserInputError("the folder was not written by finetune", where=str(spec.out))
    spec.check_resumed(record["options"])
    return record


def is_finished(spec: FinetuneSpec, record: Mapping[str, Any]) -> bool:
    """Whether a resumed run has nothing left to do."""
    same = all(record["options"].get(name) == value for name, value in spec.length().items())
    if not same or record["status"] != FINISHED:
        return False
    checkpoints = list_checkpoints(spec.out / CHECKPOINTS)
    return bool(checkpoints) and checkpoints[-1].step == record.get("steps_done")


def _restore(
    folder: Path, program: Program, state: FitState, identity: Identity, processes: Processes
) -> None:
    """Resume from the last checkpoint, if there is one."""
    if processes.is_first:
        remove_unfinished(folder)
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        restore_checkpoint(checkpoints[-1], program, state, identity)
