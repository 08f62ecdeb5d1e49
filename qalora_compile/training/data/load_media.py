"""Rows that name an image or a recording, with a label: the header of every file is checked.

A row is `{"image": path, "label": …}` or `{"audio": path, "label": …}`. A relative path starts at
the folder of the data file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.training.data.dataset import Dataset, FileCount, require_usable
from qalora_compile.training.data.media_examples import MediaExamples
from qalora_compile.training.data.read_rows import Paths, find_files, read_rows
from qalora_compile.training.data.row_forms import class_index, fields_of, string
from qalora_compile.untrusted.media_processor import MediaProcessor


def load_media(
    paths: Paths,
    processor: MediaProcessor,
    classes: tuple[str, ...],
    mapping: Mapping[str, str] | None = None,
) -> Dataset:
    """Read the rows of data files, and check the header of every image or recording in them.

    Args:
        paths: See `load_examples`.
        processor: Of the model.
        classes: Class names, in the order of the logits.
        mapping: See `LineReader`.

    Raises:
        UserInputError: a data file is missing, empty or given twice; a row is malformed; or a file
            that it names is missing, not of the kind, too large, or of another sampling rate.
        UnsupportedError: a library that reads a file is missing.
    """
    found: list[Path] = []
    labels: list[int] = []
    lengths: list[int] = []
    counts = []
    form = f"{processor.medium} and label"
    for file in find_files(paths):
        begin, cut = len(found), 0
        for number, row in read_rows(file):
            where = f"{file}:{number}"
            fields = fields_of(row, mapping, where)
            labels.append(class_index(fields, classes, where))
            found.append(file.parent / _path_of(fields, processor.medium, where))
            length, long = _checked(processor, found[-1], where)
            lengths.append(length)
            cut += long
        count = len(found) - begin
        require_usable(file, count, 0)
        counts.append(FileCount(str(file), count, cut, 0, {form: count}, looked_at=count))
    return Dataset(MediaExamples(processor, found, labels, lengths), tuple(counts), classes)


def _path_of(fields: Mapping[str, Any], medium: str, where: str) -> str:
    path = string(fields, medium, where)
    if not path or "\0" in path:
        raise UserInputError(f"the field {medium!r} is not a path", where=where)
    if "://" in path:
        raise UserInputError(
            f"the field {medium!r} is a web address, and nothing is fetched",
            where=where,
            hint="fetch the file, and write its path",
        )
    return path


def _checked(processor: MediaProcessor, path: Path, where: str) -> tuple[int, bool]:
    """`MediaProcessor.check`, with the row in the error's place."""
    try:
        return processor.check(path)
    except UserInputError as error:
        raise UserInputError(error.what, where=f"{where}: {path}", hint=error.hint) from error
