"""Training data from files: read, tokenized, counted.

The forms of a row are those of `training.forms`, the files those of `training.rows`. Small data
become a tuple of examples; of large ones the rows stay in the files (`training.lazy`), or are
tokenized once into a cache folder (`training.corpus`).
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
from qalora_compile.training.data.parse_line import LineReader, Reading
from qalora_compile.training.data.read_rows import read_rows

LOOKED_AT = 1000
"""Examples that are tokenized to count them, where the others are not."""


@dataclass(frozen=True)
class FileCount:
    """What became of a file.

    Attributes:
        path: Of the file.
        examples: How many it gave.
        truncated: How many of them were longer than the limit and were cut; of data that are read
            while training goes on, of the first ones.
        skipped: How many more had no token left to learn from (a completion that tokenizes to
            nothing).
        forms: How many examples were of each form; as `truncated`.
        remarks: What else was done to how many; as `truncated`.
        looked_at: How many examples these counts are of.
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
    """The examples of files, and what was cut to fit.

    Attributes:
        examples: In the order of the files.
        files: What became of each file.
        classes: Names of the classes of a classification task, in the order of the logits.
        token_range: The least and the largest token id, labels too; of data that are read while
            training goes on, of the examples that were looked at.
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
        """How many examples held nothing to learn."""
        return sum(file.skipped for file in self.files)

    @property
    def looked_at(self) -> int:
        """How many examples were tokenized to count them."""
        return sum(file.looked_at for file in self.files)

    @property
    def is_lazy(self) -> bool:
        """Whether the examples are tokenized while training goes on."""
        return isinstance(self.examples, LazyExamples)

    def check_tokens(self, limit: int) -> None:
        """See that a model of `limit` tokens knows every token, and every label.

        Data that are read while training goes on are checked then.

        Raises:
            UserInputError: it does not; an example with an unknown one is named.
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
    """Counts the readings of one file, into `total` too."""

    path: Path
    total: ReadCount
    looked_at: int = 0
    truncated: int = 0
    skipped: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)

    def note(self, reading: Reading) -> bool:
        """Count a reading; False if it holds nothing to learn."""
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
        """What became of the file."""
        counts = dict(self.forms), dict(self.remarks)
        return FileCount(str(self.path), examples, self.truncated, skipped, *counts, self.looked_at)


@dataclass
class ReadCount:
    """Reads files row by row, and counts."""

    files: list[FileCount] = field(default_factory=list)
    least: int | None = None
    largest: int = 0

    @property
    def token_range(self) -> tuple[int, int]:
        """The least and the largest token id that was read, labels too."""
        return self.least or 0, self.largest

    def begin(self, path: Path) -> _FileReadings:
        """Count a file."""
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
        """The same of files that are open already."""
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
        """Count the tokens of an example."""
        tokens = (*example.source, *example.tokens, *_learned(example))
        least = min(tokens)
        self.least = least if self.least is None else min(self.least, least)
        self.largest = max(self.largest, *tokens)


def require_usable(path: Path, usable: int, skipped: int) -> None:
    """Raise UserInputError if a file gave no example."""
    if not usable:
        raise UserInputError(
            f"the data file has no usable example ({skipped} held nothing to learn)",
            where=str(path),
            hint='write one JSON object a line: {"prompt": "…", "completion": "…"}',
        )


def _learned(example: Example) -> list[int]:
    """The labels that carry loss."""
    return [label for label in example.labels if label != IGNORED]


def taught_ends(data: Dataset, tokenizer: Any) -> list[int]:
    """The tokens that the examples teach as the end of an answer, the most frequent first.

    Of an example that is the last special token that carries loss (a chat's template may put a line
    break behind it); of examples without a tokenizer, the last token, if all share it. The first
    1,000 examples are looked at.

    Args:
        data: What is learned.
        tokenizer: What it was tokenized with, or None.
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
