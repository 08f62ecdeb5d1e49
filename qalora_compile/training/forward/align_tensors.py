"""`align_tensors`: what a resumed run computes does not depend on where its tensors were read."""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_compile.ir.program import Program

_BYTES = 64
"""What torch's allocator aligns to."""
_Place = tuple[int, torch.Size, tuple[int, ...]]


def align_tensors(program: Program) -> None:
    """Copy each floating tensor whose data begin at an odd place in memory, in place.

    Tensors that a file is mapped to begin where the file has them, and matrix products and
    convolutions round otherwise on such data. So a run that holds its tensors in memory and one
    that reads them again would differ in the last bits. Tensors that share their data still do.
    """
    copies: dict[_Place, Tensor] = {}
    for tensor in program.tensors().values():
        if not tensor.is_floating_point() or tensor.device.type != "cpu":
            continue
        if tensor.data_ptr() % _BYTES:
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            copy = copies.get(place)
            if copy is None:
                copy = copies[place] = tensor.detach().clone()
            tensor.data = copy
