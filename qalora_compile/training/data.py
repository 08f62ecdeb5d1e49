"""Training data from files: read, tokenized, counted.

The forms of a row are those of `training.forms`, the files those of `training.rows`. Small data
become a tuple of examples; of large ones the rows stay in the files (`training.lazy`), or are
tokenized once into a cache folder (`training.corpus`).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.training.examples import IGNORED, Example
from qalora_compile.training.forms import class_name, fields_of, is_labelled
from qalora_compile.training.lazy import LazyExamples, RowIndex, usable_rows
from qalora_compile.training.lines import COMPLETIONS, LineReader, Reading
from qalora_compile.training.rows import Paths, find_files, read_rows

_LOOKED_AT, _LEAST_LOOKED_AT = 1000, 10
"""Examples of all files, and of each at least, that are tokenized where the others are not."""


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


def load_examples(
    paths: Paths,
    tokenizer: Any,
    *,
    max_length: int,
    decoder_start: int | None = None,
    learn: str = COMPLETIONS,
    classes: tuple[str, ...] | None = None,
    cache: str | Path | None = None,
    mapping: Mapping[str, str] | None = None,
) -> Dataset:
    """Read and tokenize data files.

    An example longer than `max_length` loses its beginning (a prompt, a chat) or, for plain text,
    its end; the number cut is in the result. Of more than 20,000 rows, or 4 million tokens, the
    rows are looked at and stay in the files: they are tokenized when a batch has need of them.

    Args:
        paths: A file or folder, or several; patterns such as `data/*.jsonl` stand for files in
            sorted order.
        tokenizer: Of the model; None where the rows hold token ids.
        max_length: The most tokens of an example (and as many for the encoder).
        decoder_start: As for `LineReader`.
        learn: As for `LineReader`.
        classes: As for `LineReader`.
        cache: A folder to tokenize into, once, and to read from: memory does not grow with the
            files, and every row is tokenized before training. Needs the library `datasets`.
        mapping: As for `LineReader`.

    Raises:
        UserInputError: a file is missing, empty or given twice, a row is malformed (its number is
            named), or a file has no usable example.
        UnsupportedError: `datasets` is not installed, and a cache is asked for; or `pyarrow`, and a
            file needs it.
    """
    reader = LineReader(
        tokenizer=tokenizer,
        max_length=max_length,
        decoder_start=decoder_start,
        learn=learn,
        classes=classes,
        mapping=mapping,
    )
    files = find_files(paths)
    if cache is not None:
        from qalora_compile.training.corpus import load_corpus

        return load_corpus(files, reader, Path(cache))
    index = RowIndex(files)
    if not index.few(max_length):
        return _load_lazily(index, reader)
    count = ReadCount()
    examples = tuple(count.read_index(index, reader))
    return Dataset(examples, tuple(count.files), classes or (), count.token_range)


def _load_lazily(index: RowIndex, reader: LineReader) -> Dataset:
    """All rows checked, the first of each file tokenized, the others left in the files."""
    chosen = array("q")
    usable, skipped = Counter[int](), Counter[int]()
    for row, (owner, useful) in enumerate(usable_rows(index, reader)):
        (usable if useful else skipped)[owner] += 1
        if useful:
            chosen.append(row)
    first, counts = 0, []
    total, looked_at = ReadCount(), max(_LEAST_LOOKED_AT, _LOOKED_AT // len(index.files))
    for owner, path in enumerate(index.files):
        _require_usable(path, usable[owner], skipped[owner])
        rows = chosen[first : first + min(looked_at, usable[owner])]
        count = total.begin(path)
        for row in rows:
            where, value = index[row]
            count.note(reader.read(value, where))
        counts.append(count.result(usable[owner], skipped[owner]))
        first += usable[owner]
    examples = LazyExamples(index, chosen, reader)
    return Dataset(examples, tuple(counts), reader.classes or (), total.token_range)


def find_classes(paths: Paths, mapping: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The labels in files of a classification task, each once, in sorted order.

    Raises:
        UserInputError: a row has no label, or all have the same.
    """
    found: dict[str, str] = {}
    files = find_files(paths)
    for path in files:
        for number, row in read_rows(path):
            where = f"{path}:{number}"
            fields = fields_of(row, mapping, where)
            name = class_name(fields, where)
            kind = type(fields["label"]).__name__
            if found.setdefault(name, kind) != kind:
                raise UserInputError(f"the label {name} is a text in one line and none in another")
    if len(found) < 2:
        raise UserInputError(
            f"all examples have the same label ({next(iter(found), 'there is none')})",
            where=", ".join(map(str, files)),
            hint="a classification task needs two classes or more",
        )
    numbers = all(kind == "int" for kind in found.values())
    return tuple(sorted(found, key=int) if numbers else sorted(found))


def begins_labelled(paths: Paths, mapping: Mapping[str, str] | None = None) -> bool:
    """Whether the first row of the files is one of a classification task: a text with a label.

    Raises:
        UserInputError: there is no file, or the row cannot be read.
    """
    for path in find_files(paths):
        for number, row in read_rows(path):
            return is_labelled(fields_of(row, mapping, f"{path}:{number}"))
    return False


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
        _require_usable(path, count.looked_at, count.skipped)
        self.files.append(count.result(count.looked_at, count.skipped))

    def widen(self, example: Example) -> None:
        """Count the tokens of an example."""
        tokens = (*example.source, *example.tokens, *_learned(example))
        least = min(tokens)
        self.least = least if self.least is None else min(self.least, least)
        self.largest = max(self.largest, *tokens)


def _require_usable(path: Path, usable: int, skipped: int) -> None:
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
    learned = [_learned(example) for example in islice(data.examples, _LOOKED_AT)]
    if tokenizer is None:
        last = {labels[-1] for labels in learned if labels}
        return list(last) if len(last) == 1 and len(learned) > 1 else []
    special = set(tokenizer.all_special_ids)
    counts = Counter(
        next((label for label in reversed(labels) if label in special), None) for labels in learned
    )
    return [token for token, _ in counts.most_common() if token is not None]
