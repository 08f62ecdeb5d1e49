"""bfloat16 autocast on devices that support it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from qalora_compile.config.fit import FitSpec
from qalora_compile.errors import UnsupportedError, UserInputError


def find_device(name: str) -> torch.device:
    """The device of a name, `cpu` or as torch writes it (`cuda`, `cuda:1`, `mps`).

    Raises:
        UserInputError: torch does not know the name.
        UnsupportedError: this machine or this build of torch has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserInputError(
            f"no device is called {name}", hint="use cpu or a name of torch: cuda, cuda:1, mps"
        ) from error
    if device.type == "cpu":
        return device
    there = torch.accelerator.current_accelerator(check_available=True)
    if there is None or device.type != there.type:
        raise UnsupportedError(
            f"torch {torch.__version__} has no device {name} on this machine",
            hint=f"it has {f'cpu and {there.type}' if there else 'only cpu'}",
        )
    if (device.index or 0) >= torch.accelerator.device_count():
        raise UnsupportedError(
            f"there is no {name}", hint=f"devices of this kind: {torch.accelerator.device_count()}"
        )
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 and does not emulate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return any("bf16" in name and has for name, has in torch.cpu.get_capabilities().items())
    return False


def computing(spec: FitSpec, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass: autocast if `spec.precision` asks for it.

    Raises:
        UnsupportedError: the device has no bfloat16.
    """
    if spec.precision == "float32":
        return nullcontext()
    if not has_bfloat16(device):
        raise UnsupportedError(
            f"this {device.type} has no instructions for bfloat16, so it would only be slower",
            hint="leave precision at float32",
        )
    return torch.autocast(device.type, dtype=torch.bfloat16)
