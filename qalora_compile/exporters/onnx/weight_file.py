"""The file of weights next to a model, written tensor by tensor so that a later run can continue.

A journal next to it has a line for each complete tensor: its name, type, offset and checksum. Lines
count only as far as the bytes agree with them.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor in the file."""

    name: str
    dtype: str
    shape: list[int]
    offset: int
    length: int
    checksum: int


class WeightFile:
    """Appends tensors to those that an interrupted run has left.

    Args:
        path: The file, which may exist, with `<name>.journal` next to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._journal = path.with_name(f"{path.name}.journal")
        self._kept = {entry.name: entry for entry in self._complete_entries()}
        self._end = max((e.offset + e.length for e in self._kept.values()), default=0)

    def __enter__(self) -> WeightFile:
        self._path.touch()
        self._file = self._path.open("r+b")
        self._file.truncate(self._end)
        self._file.seek(self._end)
        lines = [json.dumps(asdict(entry)) + "\n" for entry in self._kept.values()]
        self._journal.write_text("".join(lines), "utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            self._journal.unlink()

    def find(self, name: str, dtype: str, shape: list[int]) -> Entry | None:
        """The entry that an interrupted run has written for this tensor, if there is one."""
        entry = self._kept.get(name)
        return entry if entry and (entry.dtype, entry.shape) == (dtype, shape) else None

    def add(self, name: str, dtype: str, shape: list[int], tensor: Any) -> Entry:
        """Write a tensor, which has `tofile`, and record it once it is complete."""
        tensor.tofile(self._file)
        self._file.flush()
        length = self._file.tell() - self._end
        entry = Entry(
            name=name,
            dtype=dtype,
            shape=shape,
            offset=self._end,
            length=length,
            checksum=self._checksum(self._end, length),
        )
        self._end += length
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(asdict(entry)) + "\n")
        return entry

    def _complete_entries(self) -> list[Entry]:
        """The entries of the journal, up to the first that the file does not hold."""
        if not (self._journal.is_file() and self._path.is_file()):
            return []
        entries: list[Entry] = []
        end, size = 0, self._path.stat().st_size
        for line in self._journal.read_text("utf-8").splitlines():
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):  # cut off while it was written
                break
            end += entry.length
            if entry.offset != end - entry.length or end > size:
                break
            if self._checksum(entry.offset, entry.length) != entry.checksum:
                break
            entries.append(entry)
        return entries

    def _checksum(self, offset: int, length: int) -> int:
        """CRC-32 of a part of the file, read back in pieces."""
        value = 0
        with self._path.open("rb") as file:
            file.seek(offset)
            while length:
                piece = file.read(min(length, _CHUNK_BYTES))
                if not piece:
                    return -1
                value = zlib.crc32(piece, value)
                length -= len(piece)
        return value
