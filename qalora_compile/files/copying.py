"""Copy parts of files without holding them in memory."""

from __future__ import annotations

from typing import BinaryIO

PIECE_BYTES = 1 << 20


def copy_range(source: BinaryIO, target: BinaryIO, offset: int, length: int) -> int:
    """Append `length` bytes of `source` from `offset` on; returns how many there were."""
    source.seek(offset)
    left = length
    while left and (piece := source.read(min(left, PIECE_BYTES))):
        target.write(piece)
        left -= len(piece)
    return length - left
