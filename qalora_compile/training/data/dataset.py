"""Training data from files: read, tokenized, counted.

Rows have the forms of `row_forms` and come from the files of `read_rows`. Small data become a tuple
of examples. The rows of large data stay in the files (`lazy_rows`), or are tokenized once into a
cache folder (`arrow_cache`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.training.data.example import IGNORED, Example
from qalora_compile.training.data.lazy_rows import LazyExamples, RowIndex
from qalora_compile.training.data.media_examples import MediaExamples, unit_of
from qalora_compile.training.data.parse_line import LineReader, Reading
from qalora_compile.training.data.read_rows import read_rows

LOOKED_AT = 1000
"""Examples that are tokenized to count them, if the others are tokenized later."""


@dataclass(frozen=True)
class FileCount:
    """The number of examples in a file, and how they were read.

    Attributes:
        path: The file.
        examples: Number of its examples.
        truncated: How many of them were longer than the limit and were cut. If the data are read
            during training, this counts only the first `looked_at` examples.
        skipped: How many further rows had nothing to learn (a completion without tokens).
        forms: Number of examples of each form, counted like `truncated`.
        remarks: Number of examples for each other remark, counted like `truncated`.
        looked_at: Number of examples that were counted.
    """

    path: str
    examples: int
    truncated: int
    skipped: int
    forms: Mapping[str, int] = field(default_factory=dict)
    remarks: Mapping[str, int] = field(default_factory=dict)
    looked_at: int = 0


@dataclass(frozen=True)
class Dataset:
    """The examples of files, with counts.

    Attributes:
        examples: In the order of the files.
        files: The counts of each file.
        classes: Class names of a classification task, in the order of the logits.
        token_range: The smallest and the largest token id, labels included. If the data are read
            during training, those of the examples that were looked at.
    """

    examples: Sequence[Example]
    files: tuple[FileCount, ...] = ()
    classes: tuple[str, ...] = ()
    token_range: tuple[int, int] = (0, 0)

    @property
    def truncated(self) -> int:
        """How many examples were cut."""
        return sum(file.truncated for file in self.files)

    @property
    def skipped(self) -> int:
        """How many rows held nothing to learn."""
        return sum(file.skipped for file in self.files)

    @property
    def looked_at(self) -> int:
        """How many examples were tokenized to count them."""
        return sum(file.looked_at for file in self.files)

    @property
    def is_lazy(self) -> bool:
        """Whether the examples are tokenized during training."""
        return isinstance(self.examples, LazyExamples)

    @property
    def unit(self) -> str:
        """See `unit_of`."""
        return unit_of(self.examples)

    def labels(self) -> Counter[int | None]:
        """How many examples have each class; no image or recording is read."""
        if isinstance(self.examples, MediaExamples):
            return Counter(self.examples.labels)
        return Counter(example.label for example in self.examples)

    def check_tokens(self, limit: int) -> None:
        """Check that a model of `limit` tokens knows every token and every label.

        Data that are read during training are checked then.

        Raises:
            UserInputError: it does not; an example with an unknown token is named.
        """
        if isinstance(self.examples, LazyExamples):
            self.examples.limit = limit
        least, largest = self.token_range
        if least >= 0 and largest < limit:
            return
        for number, example in enumerate(self.examples, start=1):
            example.check_tokens(limit, f"example {number}")


@dataclass
class _FileReadings:
    """Counts the readings of one file, and adds them to `total`."""

    path: Path
    total: ReadCount
    looked_at: int = 0
    truncated: int = 0
    skipped: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)

    def note(self, reading: Reading) -> bool:
        """Count a reading; returns False if it holds nothing to learn."""
        if not reading.example.learns:
            self.skipped += 1
            return False
        self.looked_at += 1
        self.truncated += reading.cut
        self.forms[reading.form] += 1
        self.remarks.update(reading.remarks)
        self.total.widen(reading.example)
        return True

    def result(self, examples: int, skipped: int) -> FileCount:
        """The counts of the file."""
        counts = dict(self.forms), dict(self.remarks)
        return FileCount(str(self.path), examples, self.truncated, skipped, *counts, self.looked_at)


@dataclass
class ReadCount:
    """Reads files row by row and counts the examples."""

    files: list[FileCount] = field(default_factory=list)
    least: int | None = None
    largest: int = 0

    @property
    def token_range(self) -> tuple[int, int]:
        """The smallest and the largest token id that was read, labels included."""
        return self.least or 0, self.largest

    def begin(self, path: Path) -> _FileReadings:
        """Begin to count a file."""
        return _FileReadings(path, self)

    def read(self, files: Sequence[Path], reader: LineReader) -> Iterator[Example]:
        """The usable examples of the files.

        Raises:
            UserInputError: see `load_examples`.
        """
        for path in files:
            rows = ((f"{path}:{number}", row) for number, row in read_rows(path))
            yield from self._read(path, rows, reader)

    def read_index(self, index: RowIndex, reader: LineReader) -> Iterator[Example]:
        """The usable examples of an index of rows."""
        begin = 0
        for path, end in zip(index.files, index.ends, strict=True):
            yield from self._read(path, (index[row] for row in range(begin, end)), reader)
            begin = end

    def _read(
        self, path: Path, rows: Iterator[tuple[str, Any]], reader: LineReader
    ) -> Iterator[Example]:
        count = self.begin(path)
        for where, row in rows:
            reading = reader.read(row, where)
            if count.note(reading):
                yield reading.example
        require_usable(path, count.looked_at, count.skipped)
        self.files.append(count.result(count.looked_at, count.skipped))

    def widen(self, example: Example) -> None:
        """Extend the token range by the tokens of an example."""
        tokens = [
            token
            for each in example.answers
            for token in (*each.source, *each.tokens, *_learned(each))
        ]
        least = min(tokens)
        self.least = least if self.least is None else min(self.least, least)
        self.largest = max(self.largest, *tokens)


def require_usable(path: Path, usable: int, skipped: int) -> None:
    """Raise UserInputError if a file gave no example."""
    if not usable:
        raise UserInputError(
            f"the data file has no usable example ({skipped} rows held nothing to learn)",
            where=str(path),
            hint='write one JSON object per line: {"prompt": "…", "completion": "…"}',
        )


def _learned(example: Example) -> list[int]:
    """The labels that carry loss."""
    return [label for label in example.labels if label != IGNORED]


def taught_ends(data: Dataset, tokenizer: Any) -> list[int]:
    """The tokens that the examples teach as the end of an answer, the most frequent first.

    In an example, it is the last special token that carries loss (a chat template may put a line
    break after it). Without a tokenizer, it is the last token, if all examples share it. The first
    1,000 examples are looked at.

    Args:
        data: The training data.
        tokenizer: The tokenizer of the data, or None.
    """
    learned = [_learned(example) for example in islice(data.examples, LOOKED_AT)]
    if tokenizer is None:
        last = {labels[-1] for labels in learned if labels}
        return list(last) if len(last) == 1 and len(learned) > 1 else []
    special = set(tokenizer.all_special_ids)
    counts = Counter(
        next((label for label in reversed(labels) if label in special), None) for labels in learned
    )
    return [token for token, _ in counts.most_common() if token is not None]
