"""The state of a `finetune` run: starting a new run, or opening one to resume it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from qalora_compile.api.codes import stored_codes
from qalora_compile.api.finetune_data import (
    arrange,
    check_trainable,
    excluded,
    load_data,
    load_files,
    load_model,
    reading_record,
    recorded_classes,
    report_data,
)
from qalora_compile.api.finetune_spec import FinetuneSpec
from qalora_compile.api.run_folder import (
    CHECKPOINTS,
    TOKENIZER,
    read_run_file,
    write_run,
    write_run_file,
)
from qalora_compile.api.steps import insert_adapters, quantize_groups
from qalora_compile.capture.load_source import Source
from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_folder
from qalora_compile.ir.finite import check_program
from qalora_compile.ir.program import Program
from qalora_compile.ir.storage import replace_adapters
from qalora_compile.progress import say
from qalora_compile.quantizers.report import QuantReport, collecting_reports
from qalora_compile.training.calibration import calibration_calls
from qalora_compile.training.data.batches import Batches
from qalora_compile.training.data.dataset import Dataset, taught_ends
from qalora_compile.training.data.example import Example
from qalora_compile.training.distributed import Processes
from qalora_compile.training.evaluate import Metrics, evaluate, program_forward
from qalora_compile.training.fit import FitState
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
from qalora_compile.untrusted.tokenizer import load_tokenizer

TRAINING, INTERRUPTED, FINISHED, FAILED = "training", "interrupted", "finished", "failed"
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
        found = evaluate(program_forward(self.program.eval()), self.held_out.examples)
        found.check(when)
        return found

    def answer(self) -> list[str]:
        """The model's answers to the first held-out examples, or else training examples."""
        return answers(self.program, self._asked(), self._tokenizer(), self.data.classes)

    def report(self, facts: dict[str, object], answered: list[str]) -> Path:
        """Write `report.html`; the answers before training come from the record."""
        asked = questions(self._asked(), self._tokenizer(), self.data.classes)
        before = self.record["answers"]
        path = self.folder / REPORT_FILE
        write_report(
            path,
            read_log(self.folder / LOG_FILE),
            layer_changes(self.program),
            title=f"Training of {Path(self.record['model']).name}",
            facts=facts,
            samples=[Sample(*row) for row in zip(asked, before, answered, strict=True)],
        )
        return path

    def _asked(self) -> list[Example]:
        return list((self.held_out or self.data).examples[:_ASKED])

    def _tokenizer(self) -> Any:
        return load_tokenizer(self.folder / TOKENIZER)

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


@dataclass(frozen=True)
class _Begun:
    """What starting a run or opening its folder yields."""

    program: Program
    trained: Program
    data: Dataset
    batches: Batches
    held_out: Dataset | None
    reports: tuple[QuantReport, ...] = ()


def _start(spec: FinetuneSpec) -> _Begun:
    """Load the model, read the data, quantize, insert adapters, and write the RUN folder."""
    codes, quant = spec.codes, spec.quant
    say(f"load {spec.model}")
    source, classes = load_model(spec)
    data, held_out = load_data(spec.reading, source.tokenizer, source.decoder_start, classes)
    say("capture")
    captured = source.capture()
    check_program(captured)
    check_trainable(captured, classes, data, held_out)
    calls = _calibration(spec, captured, data, source)
    stored = stored_codes(codes, source)
    with collecting_reports() as reports:
        program = quantize_groups(
            captured,
            quant,
            targets=codes.layers,
            exclude=excluded(spec, source),
            embeddings=codes.embedding_quant,
            calibration=calls if spec.quantizes_by_data else None,
            stored=stored,
        )
    program = insert_adapters(
        program, spec.adapter, source=captured, calibration=calls, train=source.head
    )
    trained, batches = arrange(spec, program, data, source.model)
    record = {
        "model": spec.model,
        "data": [str(Path(file.path).resolve()) for file in data.files],
        "reading": reading_record(spec.reading, classes),
        "quant": quant.to_json(),
        "adapter": spec.adapter.to_json(),
        "fit": spec.fit.to_json(),
        "options": spec.decisive(),
        "examples": len(data.examples),
        "files": {
            "data": [vars(file) for file in data.files],
            "held_out": [vars(file) for file in held_out.files] if held_out else [],
        },
        "decoder_start": source.decoder_start,
        "status": TRAINING,
        "step": 0,
    } | codes.embedding_record()
    taught = [] if classes else taught_ends(data, source.tokenizer)
    with atomic_folder(spec.out, overwrite=spec.overwrite) as folder:
        write_run(folder, program, source, record, taught=taught)
    return _Begun(program, trained, data, batches, held_out, tuple(reports))


def open_job(spec: FinetuneSpec, processes: Processes) -> Job:
    """Start a run or, with `spec.resume`, restore its last checkpoint.

    Only the first process starts it; the others open the folder that it has written.

    Raises:
        UserInputError: the folder was made with other options or data; the first one is named.
    """
    begun = None
    if not spec.resume:
        begun = _start(spec) if processes.is_first else None
        processes.wait()
    record = read_run_file(spec.out)
    if "options" not in record:
        raise UserInputError("the folder was not written by finetune", where=str(spec.out))
    if spec.resume:
        spec.check_resumed(record["options"])
    begun = begun or _open(spec, record)
    identity = Identity.of(begun.program, spec.fit, data=str(record["options"]["data"]))
    state = FitState.fresh(begun.program, spec.fit)
    if spec.resume:
        _restore(spec.out / CHECKPOINTS, begun.program, state, identity, processes)
    return Job(
        **{f.name: getattr(begun, f.name) for f in fields(begun)},
        spec=spec,
        record=record,
        state=state,
        identity=identity,
    )


def _open(spec: FinetuneSpec, record: dict[str, Any]) -> _Begun:
    """Read the program of a RUN folder, and the data."""
    program = Program.load(spec.out)
    tokenizer, classes = load_tokenizer(spec.out / TOKENIZER), recorded_classes(record)
    data, held_out = load_data(spec.reading, tokenizer, record["decoder_start"], classes)
    check_trainable(program, classes, data, held_out)
    trained, batches = arrange(spec, program, data, spec.out)
    return _Begun(program, trained, data, batches, held_out)


def _restore(
    folder: Path, program: Program, state: FitState, identity: Identity, processes: Processes
) -> None:
    """Resume from the last checkpoint, if there is one."""
    if processes.is_first:
        remove_unfinished(folder)
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        restore_checkpoint(checkpoints[-1], program, state, identity)


def _calibration(
    spec: FinetuneSpec, program: Program, data: Dataset, source: Source
) -> list[dict[str, Any]] | None:
    """Calibration calls, if a file of them is given or a setting needs them; else None."""
    if not spec.needs_calibration:
        return None
    if spec.calibration:
        data = load_files(
            spec.reading, spec.calibration, source.tokenizer, source.decoder_start, data.classes
        )
        check_trainable(program, data.classes, data)
    return calibration_calls(program, data.examples, spec.calibration_samples)
