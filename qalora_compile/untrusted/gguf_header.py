"""Check the structure of a GGUF file before any library reads it.

A file consists of magic, version, number of tensors, number of keys, the keys with their values, a
row for each tensor, and the aligned bytes of the tensors. Every count and size is compared with the
bytes of the file, and nothing is allocated by it. (Format: ggml, docs/gguf.md.)
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.untrusted import check_regular, quoted

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_HEADER = 24
_MAX_AXES, _MAX_DEPTH, _MAX_NAME, _MAX_ALIGNMENT = 4, 8, 1 << 16, 1 << 20
_MAX_ENTRIES = 1 << 21
"""Limit for all arrays, as readers make an object per entry; a vocabulary of 262,144 has 1.3 M."""
_ALIGNMENT, _ALIGNMENT_KEY = 32, "general.alignment"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"} | {
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_SMALLEST_ROW = 8 + 4 + 4 + 8
"""Bytes of the row of a tensor without a name and axes; a key with a one-byte value takes 13."""
_SMALLEST_KEY = 8 + 4 + 1
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 40), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
"""Number of a type → values in a block, bytes of a block (gguf.GGML_QUANT_SIZES)."""


@dataclass(frozen=True)
class Row:
    """The description of one tensor; `begin` and `end` count from the start of the file."""

    kind: int
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The plain values of a file's keys (arrays are replaced by their lengths), and its tensors."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Row]


def check_gguf(path: Path) -> Header:
    """Compare everything that a GGUF file says about itself with its bytes.

    Raises:
        UserInputError: the file is missing, not a regular file or not a GGUF file; it is big-endian
            or truncated; a key or tensor has a name that occurs twice or is not text, or an unknown
            type; arrays are nested more than 8 deep; tensors overlap, are not aligned, or end after
            the file; a text is not UTF-8, or there are bytes that nothing describes.
        UnsupportedError: its version is neither 2 nor 3.
    """
    check_regular(path)
    size = path.stat().st_size
    if size < _HEADER:
        raise _broken(path, f"it has {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Cursor(path, data, size).header()


class _Cursor:
    """A position in a file, which cannot leave the file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0
        self.entries = 0

    def header(self) -> Header:
        if self.take(4) != _MAGIC:
            raise _broken(self.path, "it does not begin with the bytes GGUF")
        version = self.number("<I")
        if version not in _VERSIONS and not 0 < version < 1 << 16:
            raise _broken(self.path, "its version is invalid, or it is big-endian")
        if version not in _VERSIONS:
            raise UnsupportedError(
                f"{self.path.name} is of GGUF version {version}",
                where=str(self.path),
                hint="convert it to version 2 or 3, little-endian",
            )
        tensors, keys = self.number("<Q"), self.number("<Q")
        left = self.size - self.at
        if tensors * _SMALLEST_ROW + keys * _SMALLEST_KEY > left:
            raise _broken(self.path, f"it claims {tensors} tensors and {keys} keys in {left} bytes")
        values: dict[str, Any] = {}
        for _ in range(keys):
            name = self.name()
            if name in values:
                raise _broken(self.path, f"the key {name} occurs twice")
            values[name] = self.value(name, self.number("<I"), 0)
        return Header(values, self.rows(tensors, self.alignment(values)))

    def alignment(self, values: Mapping[str, Any]) -> int:
        stated = values.get(_ALIGNMENT_KEY, _ALIGNMENT)
        fits = type(stated) is int and 8 <= stated <= _MAX_ALIGNMENT
        if not fits or stated & (stated - 1):
            raise _broken(self.path, f"its alignment is {quoted(stated)}, not a power of two")
        return int(stated)

    def rows(self, count: int, alignment: int) -> dict[str, Row]:
        found: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self.name()
            if name in found:
                raise _broken(self.path, f"the tensor {name} occurs twice")
            axes = self.number("<I")
            if axes > _MAX_AXES:
                raise _broken(self.path, f"{name} has {axes} axes")
            shape = tuple(self.number("<Q") for _ in range(axes))
            found[name] = (self.number("<I"), shape, self.number("<Q"))
        start = -(-self.at // alignment) * alignment
        made = {name: self.row(name, row, start, alignment) for name, row in found.items()}
        at, before = start, "the header"
        for name, row in sorted(made.items(), key=lambda item: item[1].begin):
            if row.begin < at:
                raise _broken(self.path, f"{name} overlaps with {before}")
            at, before = row.end, name
        self.check_end(at if made else self.at, alignment)
        return made

    def check_end(self, at: int, alignment: int) -> None:
        """Check that only padding follows what the header describes."""
        rest = self.size - at
        if rest >= alignment or any(self.data[at:]):
            raise _broken(self.path, f"{rest} bytes follow after all that its header describes")

    def row(
        self, name: str, stated: tuple[int, tuple[int, ...], int], start: int, alignment: int
    ) -> Row:
        kind, shape, offset = stated
        if kind not in _BLOCKS:
            raise _broken(self.path, f"{name} is of the unknown type {kind}")
        values, size = _BLOCKS[kind]
        elements = 1
        for length in shape:
            elements *= length  # Python's integers cannot overflow
        if elements < 1 or elements >= 1 << 63 or (shape[:1] or (1,))[0] % values:
            raise _broken(self.path, f"{name} is {list(shape)}, in blocks of {values}")
        end = start + offset + elements // values * size
        if offset % alignment or end > self.size:
            raise _broken(
                self.path,
                f"{name} is {list(shape)} of type {kind}: bytes {start + offset} to {end} of "
                f"{self.size}, aligned to {alignment}",
            )
        return Row(kind, shape, start + offset, end)

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise _broken(self.path, f"{count} bytes are needed after {self.at} of {self.size}")
        self.at += count
        return self.data[self.at - count : self.at]

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise _broken(self.path, f"{count} bytes are needed after {self.at} of {self.size}")
        self.at += count

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def name(self) -> str:
        length = self.number("<Q")
        if length > _MAX_NAME:
            raise _broken(self.path, f"a name has {length} bytes")
        raw = self.take(length)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _broken(self.path, f"the name {quoted(raw)} is not UTF-8") from error
        if not text or not text.isprintable():
            raise _broken(self.path, f"{quoted(text)} is not a name")
        return text

    def value(self, name: str, kind: int, depth: int) -> Any:
        """Read a plain value; texts and arrays are skipped and replaced by their lengths."""
        if kind in _SCALARS:
            if kind == 7 and self.data[self.at : self.at + 1] not in (b"\0", b"\1"):
                raise _broken(self.path, f"the value of {name} is neither true nor false")
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            raw = self.take(self.number("<Q"))
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _broken(self.path, f"a text of {name} is not UTF-8") from error
            return f"text of {len(raw)} bytes"
        if kind != _ARRAY or depth >= _MAX_DEPTH:
            raise _broken(self.path, f"the value of {name} is of the unknown type {kind}")
        return self.array(name, depth)

    def array(self, name: str, depth: int) -> list[int]:
        inner, count = self.number("<I"), self.number("<Q")
        self.entries += count
        if self.entries > _MAX_ENTRIES:
            raise _broken(self.path, f"its arrays have {self.entries} entries, with {name}")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
            return [count]
        if inner not in (_STRING, _ARRAY) or count * 8 > self.size - self.at:
            raise _broken(self.path, f"the array {name} is of type {inner}, with {count} entries")
        for _ in range(count):
            self.value(name, inner, depth + 1)
        return [count]


def _broken(path: Path, what: str) -> UserInputError:
    return UserInputError(
        f"{path.name} is truncated or not a GGUF file: {what}",
        where=str(path),
        hint="fetch the file again",
    )
