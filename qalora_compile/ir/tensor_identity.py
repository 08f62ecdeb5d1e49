"""Which tensors share memory, and which hold finite values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qalora_compile.ir.lazy_tensor import holds
from qalora_compile.ir.torch_internals import storage_id


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same view of the same memory."""
    if tensor.numel() == 0:
        return (id(tensor),)
    view = (tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    return (memory_key(tensor), *view)


def memory_key(tensor: Tensor) -> int:
    """Equal for tensors in the same memory; all deferred tensors, which have none, are equal."""
    return storage_id(tensor)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor is not known to hold a NaN or an infinity; integers always pass."""
    return not tensor.is_floating_point() or holds(torch.isfinite(tensor).all())
