"""Rows of data files: JSON lines, tables, and folders of them.

=====================  =============================================================================
`.jsonl` and others    one JSON object per line, UTF-8, with or without a byte order mark
`.json`                the same, or one list of objects
`.csv`, `.tsv`         the first line names the columns; values are texts
`.parquet`, `.arrow`   read with pyarrow
=====================  =============================================================================

The first three may be compressed: `.jsonl.gz`. A folder stands for the files in it; one that
`datasets` wrote (`save_to_disk`) stands for its rows.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.untrusted import check_regular, member, parse_json, quoted, read_object
from qalora_compile.untrusted.json_text import MAX_JSON_BYTES

Paths = str | Path | Sequence[str | Path]
NumberedRow = tuple[int, Any]

_BOM = b"\xef\xbb\xbf"
_GZIP = ".gz"
_TABLES = {".csv": ",", ".tsv": "\t"}
_COLUMNS = (".parquet", ".arrow")
_SUFFIXES = (".jsonl", ".ndjson", ".json", *_TABLES, *_COLUMNS)
_LISTS = ("messages", "conversations", "input_ids", "labels", "history")
"""Fields that a table of texts holds as JSON."""
_HELD_OUT = ("test", "validation", "valid", "dev", "eval")
_BATCH = 256
_JSON_TYPE = "arrow.json"
_STATE_FILE, _SPLITS_FILE = "state.json", "dataset_dict.json"


def find_files(paths: Paths) -> tuple[Path, ...]:
    """Files by name, pattern or folder.

    Raises:
        UserInputError: a pattern matches nothing, a folder holds no data or those of several
            splits, or a file is given twice.
    """
    found: list[Path] = []
    for given in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(given)
        if path.is_dir():
            found += _files_of(path)
        elif path.exists() or not glob.has_magic(str(given)):
            found.append(path)
        else:
            found += _matching(str(given))
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            raise UserInputError(f"the data file {path} is given twice", where=str(path))
        seen.add(path.resolve())
    return tuple(found)


def is_plain(path: Path) -> bool:
    """Whether each row of a file is a line of it, which can be read separately."""
    if path.suffix == ".json":
        with _opened(path) as file:
            return not _is_list(file)
    return path.suffix not in (_GZIP, *_TABLES, *_COLUMNS)


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """Number, from 1, and JSON value of each row; the line number if rows are lines.

    Raises:
        UserInputError: the file cannot be read, or a row is malformed; its number is named.
        UnsupportedError: the file needs pyarrow, which is not installed.
    """
    kind = Path(path.stem).suffix if path.suffix == _GZIP else path.suffix
    if kind in _COLUMNS:
        return _read_columns(path, kind)
    return _read_table(path, _TABLES[kind]) if kind in _TABLES else _read_json(path, kind)


def raw_lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of each line that is not empty, without a byte order mark.

    Raises:
        UserInputError: a line is longer than a JSON text may be.
    """
    number, place = 0, 0
    # Read bytes: Python's text lines also break at separators that JSON lines may contain.
    while raw := file.readline(MAX_JSON_BYTES + 1):
        number += 1
        if len(raw) > MAX_JSON_BYTES:
            raise UserInputError(
                f"the line has more than {MAX_JSON_BYTES >> 20} MiB",
                where=f"{path}:{number}",
                hint="write one JSON object per line",
            )
        line = raw.removeprefix(_BOM) if number == 1 else raw
        if line and not line.isspace():
            yield number, place + len(raw) - len(line), line
        place += len(raw)


def parse_row(raw: bytes, where: str) -> Any:
    """The JSON value of a line.

    Raises:
        UserInputError: it is not JSON, not UTF-8, or beyond the limits of `untrusted.read_json`.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserInputError(
            f"the data file is not UTF-8: {error}", where=where, hint="convert it: iconv -t UTF-8"
        ) from error
    return parse_json(text, where, what="the line", finite=True)


def _matching(pattern: str) -> list[Path]:
    matched = sorted(map(Path, glob.glob(pattern, recursive=True)))
    if not matched:
        raise UserInputError(f"no file matches {pattern}", where=pattern)
    return matched


def _files_of(folder: Path) -> list[Path]:
    """The data files of a folder, in sorted order."""
    if (folder / _SPLITS_FILE).is_file():
        splits = read_object(folder / _SPLITS_FILE).get("splits")
        names = [str(name) for name in splits] if isinstance(splits, list) else []
        if len(names) != 1:
            raise UserInputError(
                f"the folder holds the splits {quoted(', '.join(names))}; which one is meant?",
                where=str(folder),
                hint=f"give one of them, such as {folder / 'train'}",
            )
        member(folder, f"{names[0]}/{_STATE_FILE}")
        return _files_of(folder / names[0])
    if (folder / _STATE_FILE).is_file():
        files = read_object(folder / _STATE_FILE).get("_data_files")
        rows = files if isinstance(files, list) else []
        return [
            member(folder, row.get("filename") if isinstance(row, dict) else row) for row in rows
        ]
    files = sorted(f for f in folder.iterdir() if _is_data(f) and not f.name.startswith("."))
    if not files:
        raise UserInputError(
            "the folder holds no data file",
            where=str(folder),
            hint=f"known suffixes: {', '.join(_SUFFIXES)}, also followed by {_GZIP}",
        )
    apart = [file for file in files if file.name.lower().startswith(_HELD_OUT)]
    if apart and len(apart) < len(files):
        raise UserInputError(
            f"the folder holds held-out data next to training data: {apart[0].name}",
            where=str(folder),
            hint=f"give a pattern for the files to use: '{folder}/train*'",
        )
    return files


def _is_data(path: Path) -> bool:
    name = Path(path.stem) if path.suffix == _GZIP else path
    return name.suffix in _SUFFIXES and path.is_file()


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed if its name ends in the suffix of a compressed file.

    Raises:
        UserInputError: it cannot be read, or is not a regular file: a pipe may never end.
    """
    if path.exists():
        check_regular(path)
    open_file: Callable[..., Any] = gzip.open if path.suffix == _GZIP else open
    try:
        with open_file(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserInputError(
            f"cannot decompress the data file: {error}", where=str(path)
        ) from error
    except OSError as error:
        raise UserInputError(
            f"cannot read the data file: {error.strerror or error}", where=str(path)
        ) from error


def _is_list(file: IO[bytes]) -> bool:
    """Whether a JSON file begins with a list; the file is rewound."""
    head = file.read(1 << 12).removeprefix(_BOM).lstrip()
    file.seek(0)
    return head.startswith(b"[")


def _read_json(path: Path, kind: str) -> Iterator[NumberedRow]:
    with _opened(path) as file:
        if kind == ".json" and _is_list(file):
            yield from enumerate(_list_of(file, path), start=1)
            return
        for number, _, raw in raw_lines(file, path):
            yield number, parse_row(raw, f"{path}:{number}")


def _list_of(file: IO[bytes], path: Path) -> list[Any]:
    data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise UserInputError(
            f"the list has more than {MAX_JSON_BYTES >> 20} MiB",
            where=str(path),
            hint="write JSON lines, which are read one by one",
        )
    found = parse_json(data.removeprefix(_BOM), path, finite=True)
    return found if isinstance(found, list) else [found]


def _read_table(path: Path, delimiter: str) -> Iterator[NumberedRow]:
    """Rows of a table of texts, whose first line names the columns."""
    csv.field_size_limit(MAX_JSON_BYTES)
    number = 1
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) != len(names):
                raise UserInputError("two columns have the same name", where=f"{path}:1")
            for values in reader:
                number = reader.line_num
                if not values:
                    continue
                if len(values) != len(names):
                    raise UserInputError(
                        f"the row has {len(values)} values, and there are {len(names)} columns",
                        where=f"{path}:{number}",
                    )
                row = dict(zip(names, values, strict=True))
                yield number, {name: _value(name, v, path, number) for name, v in row.items()}
        except csv.Error as error:
            raise UserInputError(
                f"the table is malformed: {error}", where=f"{path}:{reader.line_num}"
            ) from error
        except UnicodeDecodeError as error:
            raise UserInputError(
                f"the data file is not UTF-8: {error}", where=f"{path}:{number}"
            ) from error


def _value(name: str, text: str, path: Path, number: int) -> Any:
    """A field of a table: a text, or the list that it holds as JSON."""
    if name not in _LISTS:
        return text
    where = f"{path}:{number}"
    return parse_json(text, where, what=f"the column {name!r}", finite=True) if text else None


def _read_columns(path: Path, kind: str) -> Iterator[NumberedRow]:
    """Rows of a columnar file, read in batches."""
    with _opened(path):
        pass  # reports a file that cannot be opened
    module = "pyarrow.parquet" if kind == ".parquet" else "pyarrow.ipc"
    library = require(module, extra="train", purpose=f"read {kind} files")
    invalid = require("pyarrow", extra="train", purpose=f"read {kind} files").ArrowException
    number = 0
    try:
        for batch in (_parquet if kind == ".parquet" else _arrow)(library, path):
            batch.validate(full=True)  # untrusted offsets may point outside of the buffer
            for start in range(0, batch.num_rows, _BATCH):
                for row in batch.slice(start, _BATCH).to_pylist():
                    number += 1
                    where = f"{path}:{number}"
                    yield number, {f.name: _plain(row[f.name], f.type, where) for f in batch.schema}
    except (invalid, OSError, UnicodeDecodeError) as error:
        raise UserInputError(
            f"cannot read the data file: {quoted(str(error), 200)}", where=f"{path}:{number + 1}"
        ) from error


def _parquet(library: Any, path: Path) -> Iterator[Any]:
    with library.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH)


def _arrow(library: Any, path: Path) -> Iterator[Any]:
    """Record batches of a stream, as `datasets` writes it, or of an indexed file."""
    pyarrow = require("pyarrow", extra="train", purpose="read .arrow files")
    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            source.seek(0)
            with library.open_file(source) as file:
                for index in range(file.num_record_batches):
                    yield file.get_batch(index)
            return
        source.seek(0)
        with library.open_stream(source) as stream:
            yield from stream


def _plain(value: Any, kind: Any, where: str) -> Any:
    """A value of a column, with JSON parsed and without fields that are null.

    All objects of a column have the union of their fields, unless `datasets` stored them as JSON.
    """
    if getattr(kind, "extension_name", "") == _JSON_TYPE and isinstance(value, str):
        return parse_json(value, where, what="a value", finite=True)
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_plain(each, kind.value_type, where) for each in value]
    if not isinstance(value, dict):
        return value
    kinds = {field.name: field.type for field in kind}
    named = {name: _plain(each, kinds.get(name), where) for name, each in value.items()}
    return {name: each for name, each in named.items() if each is not None or name == "content"}
