"""Refusal of tensors with NaN, or with infinities that are not part of a mask."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from qalora_compile.errors import UserInputError
from qalora_compile.ir.lazy_tensor import is_lazy
from qalora_compile.ir.program_parts import ProgramParts


def is_sound(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and of infinities, except for −∞ in an additive mask.

    A constant without positive numbers counts as a mask. Integers pass; so do deferred tensors,
    whose values are checked when they are read, and tensors on the meta device, which have none.
    """
    unread = is_lazy(tensor) or tensor.is_meta
    if not tensor.is_floating_point() or unread or tensor.numel() == 0:
        return True
    if bool(torch.isfinite(tensor).all()):
        return True
    masks = not isinstance(tensor, nn.Parameter) and bool((tensor <= 0).all())  # NaN is not <= 0
    return masks


def check_sound(name: str, values: Tensor, where: Path | None = None) -> None:
    """Refuse values that are not finite.

    Raises:
        UserInputError: they hold NaN or infinities; the tensor is named.
    """
    if not is_sound(values):
        raise UserInputError(
            f"the tensor {name} holds NaN or infinite values",
            where=name if where is None else str(where),
            hint="repair or reload the checkpoint; where training made them, lower the learning "
            "rate or go back to a checkpoint",
        )


def check_program(program: ProgramParts) -> None:
    """Refuse a program with values that are not finite, before any of it is written.

    Raises:
        UserInputError: a tensor holds NaN or infinities; the first is named.
    """
    for name, tensor in program.tensors().items():
        check_sound(name, tensor)
