"""Which positions of a value are padding, where the model's value is not defined.

A row of attention whose mask excludes every key is 0, a mean or NaN, depending on the kernel: torch
gives 0, ONNX's operators give the mean of all values. Other positions never read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qalora_compile.ir.signature import Signature
from qalora_compile.verify.inputs import is_mask


@dataclass(frozen=True)
class Padding:
    """The padding of one call.

    Attributes:
        masks: Masks `[batch, length]`, true at padding, by length of the sequence axis.
    """

    masks: dict[int, Tensor]

    def of(self, value: Tensor) -> Tensor | None:
        """True where an element of `value` belongs to padding, in a shape that broadcasts to it.

        None if that cannot be determined because the value has no axes of batch and sequence. They
        are the first axis and the second or third (`[batch, heads, sequence, …]`), or one for both.
        """
        shape = value.shape
        for mask in self.masks.values():
            batch, length = mask.shape
            if value.dim() >= 1 and shape[0] == batch * length and length > 1:
                return mask.reshape(-1, *[1] * (value.dim() - 1))
            for axis in (1, 2):
                if value.dim() > axis and shape[0] == batch and shape[axis] == length:
                    between = [1] * (axis - 1)
                    return mask.reshape(batch, *between, length, *[1] * (value.dim() - axis - 1))
        return None


def padding_of(signature: Signature, leaves: Sequence[Any]) -> Padding | None:
    """The padding given by a call's masks `[batch, length]`; None if nothing is padded.

    With a cache, the mask is longer than the tokens, which are its last positions.
    """
    pairs = [
        (leaf, v)
        for leaf, v in zip(signature.inputs, leaves, strict=True)
        if isinstance(v, Tensor) and v.dim() == 2
    ]
    given = [value == 0 for leaf, value in pairs if is_mask(leaf) and value.numel()]
    masks: dict[int, Tensor] = {}
    for mask in given:
        length = mask.shape[1]
        masks[length] = masks.get(length, torch.zeros_like(mask)) | mask
        for leaf, value in pairs:
            if not is_mask(leaf) and value.shape[0] == len(mask) and value.shape[1] < length:
                masks[value.shape[1]] = mask[:, length - value.shape[1] :]
    if not any(bool(mask.any()) for mask in masks.values()):
        return None
    return Padding(masks)


def counted(value: Tensor, padding: Padding | None) -> Tensor:
    """The value with zeros at padding."""
    where = None if padding is None else padding.of(value)
    return value if where is None else torch.where(where, torch.zeros_like(value), value)
