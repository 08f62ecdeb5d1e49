"""Check the header of a safetensors file before any library reads it.

A file consists of eight bytes with the length of the header, the header, and the bytes of the
tensors. The header is one JSON object: `name → {dtype, shape, data_offsets}`. Readers differ in how
they treat a header that contradicts itself, so such a header is refused here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.untrusted import check_regular, parse_json, quoted
from qalora_compile.untrusted.element_types import ELEMENT_TYPES, PROGRAM_TYPES, UNSIGNED_TYPES

MAX_HEADER_BYTES = 1 << 25
"""32 MiB: some 200,000 tensors."""
MAX_AXES = 16
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_BITS = {kind.safetensors: kind.bits for kind in ELEMENT_TYPES if kind.safetensors}
"""Bits of an element, by the format's name for its type."""
USABLE = tuple(kind.safetensors for kind in (*PROGRAM_TYPES, *UNSIGNED_TYPES))
"""Types whose numbers are the values of a tensor; smaller floats need separate scales."""


@dataclass(frozen=True)
class Row:
    """The description of one tensor; `begin` and `end` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> Mapping[str, Row]:
    """The tensors of a safetensors file by name, in the order of the header.

    Memory is bounded by the size of the header. The result is cached until the file changes.

    Raises:
        UserInputError: the file is missing or not a regular file, or its header is truncated, is
            not JSON or contradicts itself: unknown types, sizes that do not fit, tensors that
            overlap or leave gaps, names that are not text.
    """
    check_regular(path)
    info = path.stat()
    key = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    return _read(os.fspath(path), key)


def check_types(path: Path, known: Collection[str] = USABLE) -> Mapping[str, Row]:
    """`read_header`, which also refuses tensors of other types than `known`.

    Raises:
        UserInputError: see `read_header`.
        UnsupportedError: a tensor is of another type; it is named.
    """
    rows = read_header(path)
    for name, row in rows.items():
        if row.dtype not in known:
            raise UnsupportedError(
                f"{name} is of type {row.dtype}",
                where=str(path),
                hint=f"known: {', '.join(known)}; convert the checkpoint to one of these",
            )
    return rows


@lru_cache(maxsize=64)
def _read(name: str, key: tuple[int, ...]) -> Mapping[str, Row]:
    path, size = Path(name), key[2]
    try:
        with path.open("rb") as file:
            first = file.read(_LENGTH_BYTES)
            length = int.from_bytes(first, "little")
            if len(first) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise _broken(path, f"it is cut short, at {size} bytes")
            if length > MAX_HEADER_BYTES:
                raise _broken(path, f"its header has {length} bytes, over {MAX_HEADER_BYTES}")
            text = file.read(length)
    except OSError as error:
        raise UserInputError(f"cannot read {path.name}: {error.strerror}", where=name) from error
    header = parse_json(text, path, what=f"the header of {path.name}")
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    _check_metadata(header.pop(_METADATA, {}), path)
    start = _LENGTH_BYTES + length
    rows = {tensor: _row(tensor, row, start, size, path) for tensor, row in header.items()}
    _check_layout(rows, start, size, path)
    return rows


def _check_metadata(value: Any, path: Path) -> None:
    texts = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    if not texts:
        raise _broken(path, f"{_METADATA} does not map names to texts")


def _row(name: str, value: Any, start: int, size: int, path: Path) -> Row:
    if not name or not name.isprintable():
        raise _broken(path, f"{quoted(name)} is not a tensor name")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"{name} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise UnsupportedError(
            f"{name} is of type {quoted(dtype)}", where=str(path), hint=f"known: {', '.join(_BITS)}"
        )
    if not _sizes(shape) or len(shape) > MAX_AXES:
        raise _broken(path, f"the shape of {name} is {quoted(shape)}")
    if not _sizes(offsets) or len(offsets) != 2:
        raise _broken(path, f"the data_offsets of {name} are {quoted(offsets)}")
    begin, end = (start + offset for offset in offsets)
    bits = math.prod(shape) * _BITS[dtype]
    if not begin <= end <= size or bits != 8 * (end - begin):
        raise _broken(
            path,
            f"{name} is {dtype} {quoted(shape)}, of {bits / 8:g} bytes, and has bytes "
            f"{offsets[0]} to {offsets[1]} of {size - start}",
        )
    return Row(dtype, tuple(shape), begin, end)


def _sizes(value: Any) -> bool:
    """Whether a JSON value is a list of sizes."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _check_layout(rows: Mapping[str, Row], start: int, size: int, path: Path) -> None:
    """Check that the tensors cover each byte of the file exactly once."""
    at, before = start, "the header"
    for name, row in sorted(rows.items(), key=lambda item: (item[1].begin, item[1].end)):
        if row.begin != at:
            problem = "overlaps with" if row.begin < at else "leaves bytes unused after"
            raise _broken(path, f"{name} {problem} {before}")
        at, before = row.end, name
    if at != size:
        raise _broken(path, f"{size - at} bytes after {before} belong to no tensor")


def _broken(path: Path, what: str) -> UserInputError:
    return UserInputError(
        f"{path.name} is truncated or not a safetensors file: {what}",
        where=str(path),
        hint="fetch or write it again",
    )
