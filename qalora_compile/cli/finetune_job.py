"""What a run of `finetune` works with: started anew, or opened to go on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qalora_compile.api import insert_adapters, quantize_groups
from qalora_compile.capture.source import load_source
from qalora_compile.cli.embeddings import embedding_record, embedding_spec
from qalora_compile.cli.folders import (
    CHECKPOINTS,
    TOKENIZER,
    load_run,
    load_tokenizer,
    save_description,
    save_tokenizer,
    write_run_file,
)
from qalora_compile.cli.quantized import quant_spec, stored_codes
from qalora_compile.cli.training_options import adapter_spec, check_options, decisive_options
from qalora_compile.cli.ui import Steps
from qalora_compile.config import AUTO, CALIBRATED
from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_folder, check_output
from qalora_compile.ir.program import Program
from qalora_compile.ir.storage import ADAPTERS_FILE, save_tensors, write_program
from qalora_compile.quantizers.report import QuantReport, collecting_reports
from qalora_compile.training.calibration import calibration_calls
from qalora_compile.training.checkpoint import (
    list_checkpoints,
    remove_unfinished,
    restore_checkpoint,
    save_checkpoint,
)
from qalora_compile.training.data import Dataset, load_examples
from qalora_compile.training.evaluate import Metrics, evaluate, logits_of, program_forward
from qalora_compile.training.fit import FitState
from qalora_compile.training.identity import Identity
from qalora_compile.training.processes import Processes
from qalora_compile.training.spec import FitSpec
from qalora_compile.verify.inputs import token_limits

TRAINING, INTERRUPTED, FINISHED, FAILED = "training", "interrupted", "finished", "failed"
_WRITTEN = ("format", "version", "versions")


@dataclass
class Job:
    """Everything that a started or resumed run works with."""

    program: Program
    data: Dataset
    held_out: Dataset | None
    spec: FitSpec
    folder: Path
    record: dict[str, Any]
    state: FitState
    identity: Identity
    reports: tuple[QuantReport, ...] = ()

    def report_data(self, shown: Steps) -> None:
        """Say what of the data was cut or skipped."""
        for note in self.program.notes:
            shown.say(f"note: {note}")
        for name, data in (("data", self.data), ("held-out data", self.held_out)):
            if data is not None and (data.truncated or data.skipped):
                shown.say(
                    f"note: {name}: {data.truncated} examples cut to fit, "
                    f"{data.skipped} skipped (nothing to learn)"
                )

    def evaluate(self) -> Metrics | None:
        """Held-out metrics, where held-out data was given."""
        if self.held_out is None:
            return None
        return evaluate(program_forward(self.program.eval()), self.held_out.examples)

    def save(self, keep: int) -> None:
        """Write a checkpoint, and the adapters that the run would be folded with now."""
        folder = self.folder / CHECKPOINTS
        save_checkpoint(folder, self.program, self.state, self.identity, keep=keep)
        best = self.state.best
        adapters = best.adapters if best else dict(self.program.named_adapter_parameters())
        save_tensors(adapters, self.folder / ADAPTERS_FILE)
        self.note(step=best.step if best else self.state.step)

    def note(self, **facts: Any) -> None:
        """Write facts into `run.json`."""
        self.record |= facts
        rest = {k: v for k, v in self.record.items() if k not in _WRITTEN}
        write_run_file(self.folder, rest)


def start(
    options: argparse.Namespace, spec: FitSpec, out: Path, shown: Steps
) -> tuple[Program, Dataset, Dataset | None, tuple[QuantReport, ...]]:
    """Load, read the data, quantize, insert; write the RUN folder that training goes on in."""
    check_output(out, overwrite=options.overwrite)
    adapter, embeddings = adapter_spec(options), embedding_spec(options)
    quant = quant_spec(
        options,
        budget=options.budget,
        budget_unit=options.budget_unit,
        refine_offsets=options.init != "svd",  # else nothing would be left for the adapters
    )
    shown.say(f"load {options.model}")
    source = load_source(options.model)
    data, held_out = _load_data(options, source.tokenizer, source.decoder_start)
    shown.say("capture")
    captured = source.capture()
    _check_trainable(captured, data, held_out)
    calls = _calibration(options, captured, data, source.tokenizer)
    stored = stored_codes(options, source, shown)
    with collecting_reports() as reports:
        program = quantize_groups(
            captured,
            quant,
            targets=options.targets or "all-linear",
            exclude=options.exclude,
            embeddings=embeddings,
            calibration=calls if _quantizes_by_data(options) else None,
            stored=stored,
        )
    program = insert_adapters(program, adapter, source=captured, calibration=calls)
    record = {
        "model": options.model,
        "data": str(Path(options.data).resolve()),
        "quant": quant.to_json(),
        "adapter": adapter.to_json(),
        "fit": spec.to_json(),
        "options": decisive_options(options),
        "examples": len(data.examples),
        "decoder_start": source.decoder_start,
        "status": TRAINING,
        "step": 0,
    } | embedding_record(embeddings)
    with atomic_folder(out, overwrite=options.overwrite) as folder:
        write_program(program, folder)
        save_tokenizer(source.tokenizer, folder)
        save_description(source.model, folder)
        write_run_file(folder, record)
    return program, data, held_out, tuple(reports)


def open_job(options: argparse.Namespace, spec: FitSpec, shown: Steps, processes: Processes) -> Job:
    """Start a run or, with `--resume`, restore its last checkpoint.

    One process alone starts it; the others open the folder that it has written.

    Raises:
        UserInputError: the folder was made with other options or data; the first is named.
    """
    out = Path(options.out)
    begun = None
    if not options.resume:
        begun = start(options, spec, out, shown) if processes.is_first else None
        processes.wait()
    program, record = load_run(out)
    if "options" not in record:
        raise UserInputError("the folder was not written by finetune", where=str(out))
    if options.resume:
        check_options(options, record["options"], out)
    if begun is not None:
        program, data, held_out, reports = begun
    else:
        tokenizer = load_tokenizer(out / TOKENIZER)
        data, held_out = _load_data(options, tokenizer, record.get("decoder_start"))
        reports = ()
        _check_trainable(program, data, held_out)
    identity = Identity.of(program, spec, data=str(record["options"]["data"]))
    state = FitState.fresh(program, spec)
    if options.resume:
        _restore(out / CHECKPOINTS, program, state, identity, processes)
    return Job(program, data, held_out, spec, out, record, state, identity, reports)


def _restore(
    folder: Path, program: Program, state: FitState, identity: Identity, processes: Processes
) -> None:
    """Go on from the last checkpoint, where there is one."""
    if processes.is_first:
        remove_unfinished(folder)
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        restore_checkpoint(checkpoints[-1], program, state, identity)


def _calibration(
    options: argparse.Namespace, program: Program, data: Dataset, tokenizer: Any
) -> list[dict[str, Any]] | None:
    """Calls to quantize and to start for, where a file of them is given or an option needs them."""
    if options.calibration:
        data = load_examples(options.calibration, tokenizer, max_length=options.seq_len)
        _check_trainable(program, data)
    elif not (_quantizes_by_data(options) or options.rank == AUTO or options.init == "svd"):
        return None
    return calibration_calls(program, data.examples, options.calibration_samples)


def _load_data(
    options: argparse.Namespace, tokenizer: Any, decoder_start: int | None
) -> tuple[Dataset, Dataset | None]:
    """Training data, and held-out data where there are any."""
    data, held_out = (
        load_examples(path, tokenizer, max_length=options.seq_len, decoder_start=decoder_start)
        if path
        else None
        for path in (options.data, options.eval_data)
    )
    assert data is not None, "--data is required"
    return data, held_out


def _quantizes_by_data(options: argparse.Namespace) -> bool:
    needed = options.method in CALIBRATED or options.bits == AUTO
    return needed or options.calibration is not None


def _check_trainable(program: Program, *datasets: Dataset | None) -> None:
    """See, before anything is written, that the model gives logits and knows every token.

    Raises:
        UnsupportedError: it gives no logits.
        UserInputError: a token is not in its vocabulary.
    """
    args, kwargs = program.example
    with torch.no_grad():
        logits_of(program(*args, **kwargs))
    limit = min(token_limits(program).values(), default=None)
    for data in datasets:
        if data is not None and limit:
            data.check_tokens(limit)
