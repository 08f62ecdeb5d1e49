"""Load data files as a dataset: small ones are tokenized at once, large ones row by row."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora_compile.config.choices import COMPLETIONS
from qalora_compile.errors import UserInputError
from qalora_compile.training.data.dataset import LOOKED_AT, Dataset, ReadCount, require_usable
from qalora_compile.training.data.lazy_rows import LazyExamples, RowIndex, usable_rows
from qalora_compile.training.data.parse_line import LineReader
from qalora_compile.training.data.read_rows import Paths, find_files, read_rows
from qalora_compile.training.data.row_forms import class_name, fields_of, labelled_field

_LEAST_LOOKED_AT = 10
"""At least this many examples of each file are tokenized at once, even if the others are not."""


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
    pairs: bool = False,
) -> Dataset:
    """Read and tokenize data files.

    An example longer than `max_length` loses its beginning (a prompt, a chat) or, for plain text,
    its end; the number of cut examples is in the result. Data of more than 20,000 rows or 4 million
    tokens are only checked and stay in the files: rows are tokenized when a batch needs them.

    Args:
        paths: A file or folder, or several; patterns such as `data/*.jsonl` stand for files in
            sorted order.
        tokenizer: Of the model; None if the rows hold token ids.
        max_length: The largest number of tokens of an example (and also for the encoder).
        decoder_start: See `LineReader`.
        learn: See `LineReader`.
        classes: See `LineReader`.
        cache: A folder in which all rows are tokenized once, before training. Memory then does not
            grow with the data. Needs the library `datasets`.
        mapping: See `LineReader`.
        pairs: See `LineReader`; pairs are not cached.

    Raises:
        UserInputError: a file is missing, empty or given twice, a row is malformed (its number is
            named), or a file has no usable example.
        UnsupportedError: `datasets` is needed for a cache, or `pyarrow` for a file, and it is not
            installed.
    """
    reader = LineReader(
        tokenizer=tokenizer,
        max_length=max_length,
        decoder_start=decoder_start,
        learn=learn,
        classes=classes,
        mapping=mapping,
        pairs=pairs,
    )
    files = find_files(paths)
    if cache is not None:
        from qalora_compile.training.data.arrow_cache import load_arrow_cache

        return load_arrow_cache(files, reader, Path(cache))
    index = RowIndex(files)
    if not index.few(max_length):
        return _load_lazily(index, reader)
    count = ReadCount()
    examples = tuple(count.read_index(index, reader))
    return Dataset(examples, tuple(count.files), classes or (), count.token_range)


def _load_lazily(index: RowIndex, reader: LineReader) -> Dataset:
    """Check all rows and tokenize the first ones of each file; the others stay in the files."""
    chosen = array("q")
    usable, skipped = Counter[int](), Counter[int]()
    for row, (owner, useful) in enumerate(usable_rows(index, reader)):
        (usable if useful else skipped)[owner] += 1
        if useful:
            chosen.append(row)
    first, counts = 0, []
    total, looked_at = ReadCount(), max(_LEAST_LOOKED_AT, LOOKED_AT // len(index.files))
    for owner, path in enumerate(index.files):
        require_usable(path, usable[owner], skipped[owner])
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
    """The distinct labels in the files of a classification task, in sorted order.

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


def first_labelled(paths: Paths, mapping: Mapping[str, str] | None = None) -> str | None:
    """What the first row of the files puts a label on, see `labelled_field`; None if nothing.

    Raises:
        UserInputError: there is no file, or the row cannot be read.
    """
    for path in find_files(paths):
        for number, row in read_rows(path):
            return labelled_field(fields_of(row, mapping, f"{path}:{number}"))
    return None
