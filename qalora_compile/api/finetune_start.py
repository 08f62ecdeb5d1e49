"""How a `finetune` run begins: from a model, from another run, or where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.api.calibration import calls_from_files, work_folder
from qalora_compile.api.codes import stored_codes
from qalora_compile.api.finetune_data import (
    arrange,
    check_trainable,
    data_figures,
    excluded,
    load_data,
    load_model,
    reading_record,
    recorded_classes,
)
from qalora_compile.api.finetune_spec import FinetuneSpec
from qalora_compile.api.model_card import base_facts
from qalora_compile.api.run_folder import (
    MODEL,
    TOKENIZER,
    copy_parts,
    load_run,
    write_run,
    write_run_file,
)
from qalora_compile.api.steps import insert_adapters, quantize_groups
from qalora_compile.capture.describe_model import GENERATION_FILE
from qalora_compile.capture.load_source import Source
from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_folder, write_json, write_text
from qalora_compile.ir.end_tokens import TRAINING as BY_TRAINING
from qalora_compile.ir.end_tokens import Ends, ends_from_json, ends_to_json, with_ends
from qalora_compile.ir.finite import check_program
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import ADAPTED
from qalora_compile.ir.storage import write_program
from qalora_compile.progress import say
from qalora_compile.quantizers.report import QuantReport, collecting_reports
from qalora_compile.training.calibration import calibration_calls
from qalora_compile.training.data.batches import Batches
from qalora_compile.training.data.dataset import Dataset, taught_ends
from qalora_compile.untrusted import read_object
from qalora_compile.untrusted.artifacts import RUN_CONFIG
from qalora_compile.untrusted.media_processor import load_preprocessor

TRAINING = "training"


@dataclass(frozen=True)
class Begun:
    """What starting a run or opening its folder yields; the steps of `spec` are known."""

    spec: FinetuneSpec
    program: Program
    trained: Program
    data: Dataset
    batches: Batches
    held_out: Dataset | None
    reports: tuple[QuantReport, ...] = ()


def start(spec: FinetuneSpec, processes: int) -> Begun:
    """Write the RUN folder of a new run.

    Raises:
        UserInputError, UnsupportedError, CaptureError, OutputError: see `finetune`.
    """
    return _from_model(spec, processes) if spec.init_from is None else _from_run(spec, processes)


def _from_model(spec: FinetuneSpec, processes: int) -> Begun:
    """Load the model, read the data, quantize, insert adapters, and write the RUN folder."""
    codes, quant = spec.codes, spec.quant
    say(f"load {spec.model}")
    source, classes = load_model(spec)
    data, held_out = load_data(spec, source.tokenizer, source.decoder_start, classes)
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
            checkpoints=work_folder(spec.out),
        )
    program = insert_adapters(
        program, spec.adapter, source=captured, calibration=calls, train=source.head
    )
    trained, batches = arrange(spec, program, data, source.model)
    spec = spec.with_steps(len(batches), processes)
    record = (
        _record(spec, data, held_out, classes)
        | {
            "quant": quant.to_json(),
            "adapter": spec.adapter.to_json(),
            "base": base_facts(spec.model),
            "decoder_start": source.decoder_start,
        }
        | codes.embedding_record()
    )
    taught = [] if classes else taught_ends(data, source.tokenizer)
    with atomic_folder(spec.out, overwrite=spec.overwrite) as folder:
        write_run(folder, program, source, record, taught=taught)
        write_config(folder, spec)
    return Begun(spec, program, trained, data, batches, held_out, tuple(reports))


def _record(
    spec: FinetuneSpec, data: Dataset, held_out: Dataset | None, classes: tuple[str, ...]
) -> dict[str, Any]:
    """The entries of `run.json` on a run that begins."""
    decisive = spec.decisive()
    return {
        "model": spec.model,
        "data": [str(Path(file.path).resolve()) for file in data.files],
        "reading": reading_record(spec.reading, classes),
        "fit": spec.fit.to_json(),
        "options": decisive,
        "examples": len(data.examples),
        "data_figures": data_figures(data, held_out, decisive),
        "files": {
            "data": [vars(file) for file in data.files],
            "held_out": [vars(file) for file in held_out.files] if held_out else [],
        },
        "status": TRAINING,
        "step": 0,
    }


_INHERITED = ("quant", "adapter", "base", "decoder_start", "embeddings")
"""Entries of the record of a run that a run from its adapters keeps."""


def _from_run(spec: FinetuneSpec, processes: int) -> Begun:
    """Copy program and adapters of another run, with new data."""
    source = Path(spec.init_from or "")
    say(f"load {source}")
    program, then = load_run(source)
    if program.stage != ADAPTED or "reading" not in then:
        raise UserInputError(
            "only a run that finetune wrote, not folded, can be trained on",
            where=str(source),
            hint="give the RUN folder to --init-from, not the FOLDED one",
        )
    check_program(program)
    classes, tokenizer = recorded_classes(then), load_preprocessor(source / TOKENIZER)
    data, held_out = load_data(spec, tokenizer, then["decoder_start"], classes)
    check_trainable(program, classes, data, held_out)
    trained, batches = arrange(spec, program, data, source)
    spec = spec.with_steps(len(batches), processes)
    record = _record(spec, data, held_out, classes)
    record |= {name: then[name] for name in _INHERITED if name in then}
    ends = _ends(then, [] if classes else taught_ends(data, tokenizer))
    with atomic_folder(spec.out, overwrite=spec.overwrite) as folder:
        write_program(program, folder)
        copy_parts(source, folder)
        settings = folder / MODEL / GENERATION_FILE
        if settings.is_file():
            write_json(settings, with_ends(read_object(settings), ends))
        record |= {"init_from": str(source.resolve()), "ends": ends_to_json(ends)}
        write_run_file(folder, record)
        write_config(folder, spec)
    return Begun(spec, program, trained, data, batches, held_out)


def _ends(then: dict[str, Any], taught: Sequence[int]) -> Ends:
    """The end tokens that the other run recorded, and those that the data teach."""
    ends = ends_from_json(then.get("ends"))
    for token in taught:
        ends.setdefault(token, [BY_TRAINING])
    return ends


def write_config(folder: Path, spec: FinetuneSpec) -> None:
    """Write `run.yaml`, with which `finetune --config` repeats the run.

    Each value is JSON, which is YAML too.
    """
    lines = [
        f"{name.replace('_', '-')}: {json.dumps(value, ensure_ascii=False)}"
        for name, value in spec.options().items()
        if value is not None and value is not False and value != []
    ]
    write_text(folder / RUN_CONFIG, "\n".join([_HEAD, *lines]) + "\n")


_HEAD = "# Repeats this run: qalora-compile finetune --config run.yaml --out RUN2"


def reopen(spec: FinetuneSpec, record: dict[str, Any], processes: int) -> Begun:
    """Read the program of a RUN folder, and the data."""
    program = Program.load(spec.out)
    tokenizer, classes = load_preprocessor(spec.out / TOKENIZER), recorded_classes(record)
    data, held_out = load_data(spec, tokenizer, record["decoder_start"], classes)
    check_trainable(program, classes, data, held_out)
    trained, batches = arrange(spec, program, data, spec.out)
    spec = spec.with_steps(len(batches), processes)
    return Begun(spec, program, trained, data, batches, held_out)


def _calibration(
    spec: FinetuneSpec, program: Program, data: Dataset, source: Source
) -> list[dict[str, Any]] | None:
    """Calibration calls, if a file of them is given or a setting needs them; else None."""
    if not spec.needs_calibration:
        return None
    if spec.calibration:
        return calls_from_files(
            program,
            spec.calibration,
            spec.calibration_samples,
            source,
            spec.reading,
            classes=data.classes,
            pairs=spec.fit.learns_pairs,
        )
    return calibration_calls(program, data.examples, spec.calibration_samples)
