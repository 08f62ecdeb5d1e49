"""Kernels of layers for `torch.autocast`: inputs are cast, scales and offsets are not.

Torch's own helper would cast every floating argument. A scale in bfloat16 would move all weights of
its group by up to 0.4 %, so each weight is cast only after it has been dequantized.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qalora_compile.ir.ops import affine_linear, experts, integer_zero_linear, linear
from qalora_compile.ir.torch_internals import overload_of

_LAYERS = (
    (overload_of(linear.group_linear), (0, 4)),
    (overload_of(integer_zero_linear.integer_zero_linear), (0, 4)),
    (overload_of(affine_linear.affine_linear), (0, 4)),
    (overload_of(experts.expert_linear), (0,)),
)
"""Operator → positions of the arguments that are cast: the input and a bias."""
_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def _call(operator: Any, cast: tuple[int, ...], device: str, *arguments: Any) -> Tensor:
    """Call an operator with some arguments cast to the dtype of autocast, and autocast off."""
    dtype = torch.get_autocast_dtype(device)
    values = [
        value.to(dtype)
        if index in cast and isinstance(value, Tensor) and value.dtype == torch.float32
        else value
        for index, value in enumerate(arguments)
    ]
    with torch.autocast(device, enabled=False):
        result: Tensor = operator(*values)
    return result


LIBRARY = torch.library.Library(linear.NAMESPACE, "IMPL")
"""Keeps the kernels registered: they live as long as their library."""
for _operator, _cast in _LAYERS:
    for _device, _key in _KEYS.items():
        LIBRARY.impl(_operator, partial(_call, _operator, _cast, _device), _key)
