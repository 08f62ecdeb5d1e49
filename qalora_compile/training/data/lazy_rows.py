"""Rows of large data, which stay in their files and become examples when a batch needs them.

An index of offsets makes every row accessible. Rows that are not lines of a plain file, such as
those of tables and compressed files, are first copied as lines into a temporary file.
"""

from __future__ import annotations

import json
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qalora_compile.errors import UserInputError
from qalora_compile.training.data.example import Example, Examples
from qalora_compile.training.data.parse_line import LineReader
from qalora_compile.training.data.read_rows import is_plain, parse_row, raw_lines, read_rows
from qalora_compile.untrusted import check_regular

_FEW_ROWS = 20_000
_FEW_TOKENS = 4_000_000
"""Data within these limits are read at once; their tokens take less than 400 MB."""
_BYTES_A_TOKEN = 4


class RowIndex:
    """The rows of files, with random access.

    Args:
        files: See `read_rows.find_files`.

    Raises:
        UserInputError: a file cannot be read, or a row of a file that is not plain lines.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.ends: list[int] = []
        """Number of rows up to the end of each file."""
        self.size = 0
        """Total bytes of all rows."""
        self._opened: list[IO[bytes]] = []
        self._open_files = ExitStack()
        weakref.finalize(self, self._open_files.close)
        self._places, self._numbers = array("q"), array("q")
        for path in files:
            self._add(path)
            self.ends.append(len(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        """File and number of a row, and its value.

        Raises:
            UserInputError: it is not JSON.
        """
        owner = bisect_right(self.ends, index)
        where = f"{self.files[owner]}:{self._numbers[index]}"
        file = self._opened[owner]
        file.seek(self._places[index])
        return where, parse_row(file.readline(), where)

    def few(self, max_length: int) -> bool:
        """Whether the examples of all rows, of at most `max_length` tokens, fit into memory."""
        tokens = min(self.size // _BYTES_A_TOKEN, len(self) * max_length)
        return len(self) <= _FEW_ROWS and tokens <= _FEW_TOKENS

    def _add(self, path: Path) -> None:
        if is_plain(path):
            file = self._open_files.enter_context(_open_plain(path))
            for number, place, raw in raw_lines(file, path):
                self._note(number, place, len(raw))
        else:
            file = self._open_files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            for number, row in read_rows(path):
                place = file.tell()
                self._note(number, place, file.write(json.dumps(row).encode() + b"\n"))
        self._opened.append(file)

    def _note(self, number: int, place: int, size: int) -> None:
        self._numbers.append(number)
        self._places.append(place)
        self.size += size


def _open_plain(path: Path) -> IO[bytes]:
    if path.exists():
        check_regular(path)  # reading a pipe or a device may never end
    try:
        return path.open("rb")
    except OSError as error:
        raise UserInputError(
            f"cannot read the data file: {error.strerror}", where=str(path)
        ) from error


class LazyExamples(Examples):
    """Examples of rows that are tokenized each time they are asked for.

    Args:
        index: The rows.
        chosen: The indices of those that hold something to learn.
        reader: Makes examples of them.
    """

    def __init__(self, index: RowIndex, chosen: array[int], reader: LineReader) -> None:
        self._index, self._chosen, self._reader = index, chosen, reader
        self.limit: int | None = None
        """Size of the model's vocabulary; an example with an unknown token is refused."""

    def __len__(self) -> int:
        return len(self._chosen)

    @cached_property
    def lengths(self) -> Tensor:
        """`Example.length` of each, `[n]` int64; tokenizes all rows once."""
        return torch.tensor(array("q", (example.length for example in self)), dtype=torch.int64)

    def take(self, indices: Sequence[int]) -> list[Example]:
        """The examples at some positions.

        Raises:
            UserInputError: a row holds nothing to learn or a token that the model does not know.
        """
        return [self._read(self._chosen[index]) for index in indices]

    def _read(self, row: int) -> Example:
        where, value = self._index[row]
        example = self._reader.read(value, where).example
        if not example.learns:
            raise UserInputError(
                "the line holds nothing to learn", where=where, hint="leave it out"
            )
        if self.limit is not None:
            example.check_tokens(self.limit, where)
        return example


def usable_rows(index: RowIndex, reader: LineReader) -> Iterator[tuple[int, bool]]:
    """For each row, the index of its file and whether it can be learned; rows are only checked.

    Raises:
        UserInputError: a row is malformed.
    """
    owner = 0
    for row in range(len(index)):
        while row >= index.ends[owner]:
            owner += 1
        where, value = index[row]
        yield owner, reader.check(value, where)
