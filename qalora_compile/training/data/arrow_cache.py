"""Data larger than memory, tokenized once into an Arrow file that is memory-mapped, not loaded.

A cache folder holds one folder for each combination of files, tokenizer and options, named by their
hash. A changed file therefore gets a new folder.

=================  ===============================================================================
`examples.arrow`   columns `tokens`, `labels`, `source`, `label`, `length`, written by `datasets`
`dataset.json`     what was counted while it was written
=================  ===============================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.files import atomic_folder, write_json
from qalora_compile.optional import require
from qalora_compile.training.data.dataset import Dataset, FileCount, ReadCount
from qalora_compile.training.data.example import Example, Examples
from qalora_compile.training.data.parse_line import LineReader
from qalora_compile.untrusted import read_json

EXAMPLES_FILE, COUNTS_FILE = "examples.arrow", "dataset.json"
_VERSION = 3
_ROWS = 1000
"""Examples that are collected in memory before they are written."""
_STATE = ("truncation", "padding")
"""Parts of a tokenizer's description that depend on its last call."""


class ArrowExamples(Examples):
    """Examples in an Arrow file; only those that are asked for are read from disk."""

    def __init__(self, path: Path) -> None:
        library = _library()
        self._table = library.Dataset.from_file(str(path))
        lengths = self._table.data.column("length").to_numpy()
        self._lengths = torch.tensor(lengths, dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """`Example.length` of each, `[n]` int64."""
        return self._lengths

    def take(self, indices: Sequence[int]) -> list[Example]:
        """The examples at some positions."""
        found = self._table[list(indices)]
        columns = (found[name] for name in ("tokens", "labels", "source", "label"))
        return [
            Example(tuple(tokens), tuple(labels), tuple(source), label)
            for tokens, labels, source, label in zip(*columns, strict=True)
        ]


def load_arrow_cache(files: Sequence[Path], reader: LineReader, cache: Path) -> Dataset:
    """The data of files, tokenized into the cache unless they are there already.

    Raises:
        UserInputError: see `load_examples`; nothing is then left in the cache.
        UnsupportedError: the library `datasets` is not installed.
    """
    if reader.pairs:
        raise UserInputError(
            "the cache of tokenized data holds no pairs of answers",
            where=str(cache),
            hint="leave out --data-cache of finetune: large data are tokenized during training",
        )
    _library()
    folder = cache / _key(files, reader)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):  # other processes wait for the first
        if not folder.is_dir():
            _write(files, reader, folder)
    counts = read_json(folder / COUNTS_FILE)
    least, largest = counts["token_range"]
    return Dataset(
        ArrowExamples(folder / EXAMPLES_FILE),
        tuple(FileCount(**file) for file in counts["files"]),
        reader.classes or (),
        (least, largest),
    )


def _write(files: Sequence[Path], reader: LineReader, folder: Path) -> None:
    features, writer_type = _library().Features, _library("datasets.arrow_writer").ArrowWriter
    value = _library().Value
    lists = {name: _library().List(value("int32")) for name in ("tokens", "labels", "source")}
    columns = features(lists | {"label": value("int32"), "length": value("int32")})
    count = ReadCount()
    with atomic_folder(folder) as staging:
        path = str(staging / EXAMPLES_FILE)
        with writer_type(path=path, features=columns, writer_batch_size=_ROWS) as writer:
            for example in count.read(files, reader):
                row = {name: getattr(example, name) for name in columns}
                writer.write({k: list(v) if isinstance(v, tuple) else v for k, v in row.items()})
            writer.finalize()
        write_json(
            staging / COUNTS_FILE,
            {
                "files": [dataclasses.asdict(file) for file in count.files],
                "token_range": count.token_range,
            },
        )


def _key(files: Sequence[Path], reader: LineReader) -> str:
    """A hash of all that the examples depend on; a file is its name, size and time of change."""
    stats = [(str(file.resolve()), _stat(file)) for file in files]
    options = {
        field.name: getattr(reader, field.name)
        for field in dataclasses.fields(reader)
        if field.name != "tokenizer"
    }
    value = [_VERSION, stats, options, _description(reader.tokenizer)]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _stat(file: Path) -> tuple[int, int] | None:
    """Size and time of change; None for a missing file, which reading it will report."""
    if not file.exists():
        return None
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _description(tokenizer: Any) -> list[Any]:
    """The state of a tokenizer that determines the tokens of a text."""
    if tokenizer is None:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inside: Any = sorted(tokenizer.get_vocab().items()) if backend is None else None
    if backend is not None:
        parts = json.loads(backend.to_str())
        inside = {name: part for name, part in parts.items() if name not in _STATE}
    template = getattr(tokenizer, "chat_template", None)
    return [type(tokenizer).__name__, inside, template, tokenizer.eos_token_id]


def _library(module: str = "datasets") -> Any:
    return require(module, extra="train", purpose="read data larger than memory")
