"""RUN and FOLDED folders: a program, `run.json`, the tokenizer and the model's description."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qalora_compile._version import __version__
from qalora_compile.capture.describe_model import (
    CONFIG_FILE,
    GENERATION_FILE,
    METADATA_FILE,
    model_config,
)
from qalora_compile.capture.load_source import Source
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.checkpoints.gguf.metadata import write_metadata_file
from qalora_compile.files import write_json
from qalora_compile.ir.end_tokens import Ends, end_tokens, ends_to_json, with_ends
from qalora_compile.ir.program import Program
from qalora_compile.ir.storage import write_program
from qalora_compile.sealed import read_sealed, write_sealed
from qalora_compile.untrusted import check_folder, quoted, read_object
from qalora_compile.untrusted.artifacts import PREPROCESSOR_FILE, PROGRAM_FILE

RUN_FILE = "run.json"
TOKENIZER = "tokenizer"
MODEL = "model"
CHECKPOINTS = "checkpoints"
_PREPROCESSOR_FILES = (PREPROCESSOR_FILE, "processor_config.json")
_SAVED = (
    "it holds a program that was saved in Python, without tokenizer and configuration; write it "
    'there: qc.export_model(qc.Program.load(folder), "model.onnx")'
)
FORMAT = "qalora-run"
VERSION = 2
"""Version 2 has a digest; version 1, which has none, can still be read."""


def versions() -> dict[str, str]:
    """Versions of the software that writes a folder."""
    import torch

    return {
        "qalora-compile": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_run_file(folder: Path, record: dict[str, Any]) -> None:
    """Write `run.json`: the command that made the folder, its inputs and its options."""
    head = {"format": FORMAT, "version": VERSION, "versions": versions()}
    write_sealed(folder / RUN_FILE, head | record)


def read_run_file(folder: Path) -> dict[str, Any]:
    """Read `run.json`.

    Raises:
        UserInputError: the folder is missing, was not written by `finetune` or `fold`, or is of
            another format version.
    """
    _check_is_run(folder)
    check_folder(folder)
    return read_record(folder / RUN_FILE, FORMAT, VERSION)


def _check_is_run(folder: Path) -> None:
    if not folder.is_dir():
        raise UserInputError(f"there is no folder {folder}", where=str(folder))
    if not (folder / RUN_FILE).is_file():
        saved = (folder / PROGRAM_FILE).is_file()
        raise UserInputError(
            f"{folder} was not written by finetune or fold: it holds no {RUN_FILE}",
            where=str(folder),
            hint=_SAVED if saved else "give the folder that --out named",
        )


def read_record(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Read the record of a folder: what made it, from what, with which options.

    Raises:
        UserInputError: the file is not JSON, of another kind, or of another format version.
    """
    record = read_sealed(path, since=version)
    if record.get("format") != kind:
        raise UserInputError(f"{path.name} is of another kind", where=str(path))
    if record.get("version") not in range(1, version + 1):
        raise UserInputError(
            f"the folder has version {quoted(record.get('version'))}, but this package reads 1 to "
            f"{version}",
            where=str(path.parent),
            hint="use the qalora-compile that wrote it",
        )
    return record


def load_run(folder: Path, *, lazy: bool = False) -> tuple[Program, dict[str, Any]]:
    """The program and the record of a RUN or FOLDED folder; see `Program.load`."""
    _check_is_run(folder)
    program = Program.load(folder, lazy=lazy)  # checks every entry of the folder
    return program, read_record(folder / RUN_FILE, FORMAT, VERSION)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files, if there is a tokenizer."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / TOKENIZER)


def write_run(
    folder: Path,
    program: Program,
    source: Source,
    record: Mapping[str, Any],
    *,
    taught: Sequence[int] = (),
) -> None:
    """Write a RUN folder: the program, what its source has besides weights, and the record.

    `taught` are the end tokens that the training data teach.
    """
    write_program(program, folder)
    save_tokenizer(source.tokenizer, folder)
    gguf = Path(source.reference) if source.kind == "gguf" else None
    ends = save_description(source.model, folder, gguf, tokenizer=source.tokenizer, taught=taught)
    write_run_file(folder, {**record, "ends": ends_to_json(ends)})


def save_description(
    model: Any,
    folder: Path,
    gguf: Path | None = None,
    *,
    tokenizer: Any = None,
    taught: Sequence[int] = (),
) -> Ends:
    """Write `config.json` and `generation_config.json` of a transformers model, and no weights.

    From them the model is captured again, with a key-value cache; other models have none. The
    metadata of a GGUF file are stored next to them, to be written into another GGUF file.

    Args:
        model: The model.
        folder: The folder to write into.
        gguf: The GGUF file that the model was read from, or None.
        tokenizer: The model's tokenizer, or None.
        taught: Tokens that training teaches as the end of an answer.

    Returns:
        The end tokens of a generating model, which its generation settings name.
    """
    value = model_config(model)
    if value is None:
        return {}
    (folder / MODEL).mkdir()
    write_json(folder / MODEL / CONFIG_FILE, value)
    generation: Any = getattr(model, "generation_config", None)
    if gguf is not None:
        write_metadata_file(gguf, folder / MODEL / METADATA_FILE)
    if generation is None:
        return {}
    generation.save_pretrained(folder / MODEL)
    path = folder / MODEL / GENERATION_FILE
    settings = read_object(path)
    ends = end_tokens(value, settings, tokenizer=tokenizer, taught=taught)
    write_json(path, with_ends(settings, ends))
    return ends


def copy_parts(source: Path, target: Path) -> None:
    """Copy tokenizer and model description of a folder."""
    for name in (TOKENIZER, MODEL):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)


def copy_preprocessor(source: Path, target: Path) -> bool:
    """Copy the configuration of a feature extractor (Whisper); False if there is none."""
    files = [source / name for name in _PREPROCESSOR_FILES if (source / name).is_file()]
    for file in files:
        shutil.copy2(file, target / file.name)
    return bool(files)
