"""What ONNX Runtime's MatMulNBits takes: widths of codes and sizes of blocks."""

from __future__ import annotations

MIN_BLOCK = 16
MAX_BLOCK = 256  # blocks of 512 and more gave zeros in ONNX Runtime up to 1.26


def padded_group(group_size: int) -> int:
    """The least width of a group, at or above its size, that divides into whole blocks."""
    return -(-group_size // MIN_BLOCK) * MIN_BLOCK


def largest_block(width: int) -> int:
    """The largest block, a power of two, that divides a group of `width`, a multiple of 16."""
    return min(width & -width, MAX_BLOCK)


def stored_bits(bits: int, *, narrow: bool) -> int:
    """The width in which the kernel takes codes of `bits` bits.

    3-bit codes are stored in 4 bits, there being no 3-bit type or kernel; so are 2-bit codes unless
    `narrow`: the 2-bit kernel is about 100 times slower in float32.
    """
    return 4 if bits == 3 or (bits == 2 and not narrow) else bits
