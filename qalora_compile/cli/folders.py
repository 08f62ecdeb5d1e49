"""RUN and FOLDED folders: a program, `run.json`, the tokenizer and the model's description."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

from qalora_compile import __version__
from qalora_compile.errors import UserInputError
from qalora_compile.files import read_json, write_json
from qalora_compile.ir.program import Program
from qalora_compile.ir.storage import read_program
from qalora_compile.optional import require

RUN_FILE = "run.json"
TOKENIZER = "tokenizer"
MODEL = "model"
CHECKPOINTS = "checkpoints"
_TOKENIZER_FILES = (
    *("tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model", "chat_template*"),
)
_PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
FORMAT = "qalora-run"
VERSION = 1


def versions() -> dict[str, str]:
    """Versions of what made a folder."""
    import torch

    return {
        "qalora-compile": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_run_file(folder: Path, record: dict[str, Any]) -> None:
    """Write `run.json`: what made the folder, from what, with which options."""
    write_json(
        folder / RUN_FILE,
        {"format": FORMAT, "version": VERSION, "versions": versions(), **record},
    )


def read_run_file(folder: Path) -> dict[str, Any]:
    """Read `run.json`.

    Raises:
        UserInputError: the folder is missing, was not written by `finetune` or `fold`, or is of
            another format version.
    """
    if not folder.is_dir():
        raise UserInputError(f"there is no folder {folder}", where=str(folder))
    if not (folder / RUN_FILE).is_file():
        raise UserInputError(
            f"{folder} was not written by finetune or fold: it holds no {RUN_FILE}",
            where=str(folder),
            hint="give the folder that --out named",
        )
    return read_record(folder / RUN_FILE, FORMAT, VERSION)


def read_record(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Read the file in which a folder says what made it.

    Raises:
        UserInputError: it is no JSON, of another kind, or of another format version.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != kind:
        raise UserInputError(f"{path.name} is of another kind", where=str(path))
    if record.get("version") != version:
        raise UserInputError(
            f"the folder has version {record.get('version')}, this package reads {version}",
            where=str(path.parent),
            hint="use the qalora-compile that wrote it",
        )
    return record


def load_run(folder: Path, *, deferred: bool = False) -> tuple[Program, dict[str, Any]]:
    """The program and the record of a RUN or FOLDED folder; see `read_program`."""
    record = read_run_file(folder)
    return read_program(folder, deferred=deferred), record


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files, if there is a tokenizer."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / TOKENIZER)


def save_description(model: Any, folder: Path) -> None:
    """Write `config.json` and `generation_config.json` of a transformers model, and no weights.

    They describe the model to be captured again, with a key-value cache; other models have none.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or not type(model).__module__.startswith("transformers."):
        return
    (folder / MODEL).mkdir()
    value = config.to_diff_dict() | {"architectures": [type(model).__name__]}
    value = {k: v for k, v in value.items() if k not in ("quantization_config", "use_cache")}
    write_json(folder / MODEL / "config.json", value)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder / MODEL)


def copy_parts(source: Path, target: Path) -> None:
    """Copy what a folder holds beside its program: tokenizer and description."""
    for name in (TOKENIZER, MODEL):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's files among those of a folder; False where there are none."""
    files = [file for name in _TOKENIZER_FILES for file in source.glob(name) if file.is_file()]
    for file in files:
        shutil.copy2(file, target / file.name)
    return bool(files)


def copy_preprocessor(source: Path, target: Path) -> bool:
    """Copy the description of a model's features, such as Whisper's; False where there is none."""
    files = [source / name for name in _PREPROCESSOR_FILES if (source / name).is_file()]
    for file in files:
        shutil.copy2(file, target / file.name)
    return bool(files)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, or None.

    Raises:
        UserInputError: its files are broken.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    transformers = require("transformers", extra="hf", purpose="load a tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises types of many kinds
        raise UserInputError(f"cannot load the tokenizer: {error}", where=str(folder)) from error
