"""The layout of 4-bit codes for torch's own kernel, `aten._weight_int4pack_mm_for_cpu`.

The kernel multiplies by `W = scale · (q − 8) + zero`, with a real-valued zero for each group. Its
packed layout depends on the vectors of the processor (AVX-512, AVX2, others), and a tensor that was
packed for another one is multiplied without an error, wrongly. `PROBE` tells them apart: its packed
form differs in all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_compile.ir.torch_internals import PACK_INT4

ROW_UNIT, GROUPS, MIDDLE = 16, (256, 128, 64, 32), 8
"""Rows of a weight come in multiples of `ROW_UNIT`; the group sizes of the kernel, and the code
whose value is `zero`."""


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes `[N, K]` for this processor, `[N, K / 2]` uint8.

    Args:
        codes: Integers from 0 to 15; N is a multiple of 16, and K is even.
    """
    packed: Tensor = PACK_INT4(codes.int(), 1)
    return packed


def probe() -> Tensor:
    """Codes `[128, 16]` int32 whose packed form shows for which vectors it was made."""
    place = torch.arange(128 * 16, dtype=torch.int32).reshape(128, 16)
    return (place * 7 + place // 16 * 3) % 16


def layout_name() -> str:
    """The vectors of this processor as torch calls them, for messages: `AVX512`, for example."""
    return torch.backends.cpu.get_cpu_capability()
