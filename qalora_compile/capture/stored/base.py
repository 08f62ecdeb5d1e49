"""What readers of quantized checkpoints share: the protocol, and codes out of a stream of bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora_compile.config import SUPPORTED_BITS
from qalora_compile.errors import UserInputError
from qalora_compile.ir.affine import GroupAffine, group_count
from qalora_compile.ir.stored_codes import StoredWeight


@dataclass(frozen=True)
class Decoded:
    """What a reader makes of the tensors of a checkpoint.

    Attributes:
        weights: Quantized weights by the name of their module.
        used: Names of the tensors that they were made of.
        notes: What the user should know.
        turned: Modules whose parameter is `[K, N]`.
    """

    weights: dict[str, StoredWeight]
    used: frozenset[str]
    notes: tuple[str, ...] = ()
    turned: frozenset[str] = frozenset()


Tensors = Mapping[str, Tensor]
Reader = Callable[[Tensors, Mapping[str, Any]], Decoded]
"""(tensors by name, `config.json`) → what is in them."""


def kept_bits(bits: int) -> int:
    """The width in which codes of `bits` are kept: the next that this package has.

    Raises:
        UserInputError: there is none.
    """
    fitting = [width for width in SUPPORTED_BITS if width >= bits > 0]
    if not fitting:
        raise UserInputError(f"codes of {bits} bits", hint="2 to 8 bits can be read")
    return fitting[0]


def unpack_stream(raw: Tensor, bits: int, count: int) -> Tensor:
    """Codes `[R, count]` uint8 from rows of little-endian bits `[R, bytes]` uint8.

    Code i lies in bits `i · bits … (i + 1) · bits − 1` of its row, across bytes where it has to.
    """
    flat = np.unpackbits(raw.contiguous().numpy(), axis=1, bitorder="little")
    each = flat[:, : count * bits].reshape(len(flat), count, bits)
    return torch.from_numpy(np.packbits(each, axis=2, bitorder="little")[..., 0])


def take(tensors: Tensors, module: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a module by the names of its parts.

    Raises:
        UserInputError: one is missing; it is named.
    """
    missing = next((part for part in parts if f"{module}.{part}" not in tensors), None)
    if missing is not None:
        raise UserInputError(f"the checkpoint has no tensor {module}.{missing}", where=module)
    return {part: tensors[f"{module}.{part}"] for part in parts}


def check_shapes(name: str, codes: Tensor, group_size: int, **parts: Tensor) -> None:
    """Scales and what goes with them have one value for each row and group, `[N, L]`.

    Raises:
        UserInputError: one has another shape; the tensor and both shapes are named.
    """
    wanted = [codes.shape[0], group_count(codes.shape[1], group_size)]
    for part, values in parts.items():
        if list(values.shape) != wanted:
            raise UserInputError(
                f"{name}.{part} is {list(values.shape)}, and its codes {list(codes.shape)} in "
                f"groups of {group_size} want {wanted}",
                where=f"{name}.{part}",
                hint="the checkpoint is inconsistent: fetch it again",
            )


def affine_of(
    name: str, codes: Tensor, scale: Tensor, offset: Tensor, bits: int, g: int
) -> GroupAffine:
    """Checked codes with float32 scale and offset.

    Raises:
        UserInputError: they are not valid; the module is named.
    """
    check_shapes(name, codes, g, scale=scale, offset=offset)
    try:
        return GroupAffine(
            codes.contiguous(),
            scale.float().contiguous(),
            offset.float().contiguous(),
            kept_bits(bits),
            g,
        ).validate()
    except UserInputError as error:
        error.where = name
        raise


def widened_notes(weights: Mapping[str, StoredWeight], bits: Mapping[str, int]) -> tuple[str, ...]:
    """A note where codes are kept in more bits than the checkpoint has them in."""
    wide = [name for name, stored in weights.items() if stored.affine.bits != bits[name]]
    if not wide:
        return ()
    first = wide[0]
    return (
        f"{len(wide)} weights keep their {bits[first]}-bit codes in "
        f"{weights[first].affine.bits} bits each",
    )
