"""Shared by readers of quantized checkpoints: the protocol, checks, and unpacking of bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qalora_compile.config import SUPPORTED_BITS
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.affine import GroupAffine, group_count
from qalora_compile.ir.checkpoint_codes import CheckpointWeight


@dataclass(frozen=True)
class Decoded:
    """The result of reading the tensors of a checkpoint.

    Attributes:
        weights: Quantized weights by the name of their module.
        used: Names of the tensors that they were read from.
        notes: Notes for the user.
        transposed: Modules whose parameter is `[K, N]` instead of `[N, K]`.
    """

    weights: dict[str, CheckpointWeight]
    used: frozenset[str]
    notes: tuple[str, ...] = ()
    transposed: frozenset[str] = frozenset()


CONFIG = "config.json"
"""The entry for options of the entire checkpoint."""
ONE_GROUP_A_ROW = -1
"""The group size that makes each row of a weight one group."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class OpenFolder:
    """The folder that a checkpoint is read from.

    Attributes:
        path: Path of the folder.
        modules: The modules that `config.json` describes, without weights, by each of their names.
        zero_points: How zero-points are stored, if the user states it.
    """

    path: Path
    modules: Callable[[], Mapping[str, nn.Module]]
    zero_points: str | None = None


Reader = Callable[[Tensors, Mapping[str, Any], OpenFolder], Decoded]
"""(tensors by name, `config.json`, their folder) → the quantized weights."""


def kept_bits(bits: int) -> int:
    """The width in which codes of `bits` are kept: the next one that this package supports.

    Raises:
        UserInputError: there is no such width.
    """
    fitting = [width for width in SUPPORTED_BITS if width >= bits > 0]
    if not fitting:
        raise UserInputError(f"codes of {bits} bits", hint="2 to 8 bits can be read")
    return fitting[0]


def unpack_stream(raw: Tensor, bits: int, count: int) -> Tensor:
    """Codes `[R, count]` uint8 from rows of little-endian bits `[R, bytes]` uint8.

    Code i is in bits `i · bits … (i + 1) · bits − 1` of its row and may cross a byte boundary.
    """
    flat = np.unpackbits(raw.contiguous().numpy(), axis=1, bitorder="little")
    each = flat[:, : count * bits].reshape(len(flat), count, bits)
    return torch.from_numpy(np.packbits(each, axis=2, bitorder="little")[..., 0])


def take(tensors: Tensors, module: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a module by part name.

    Raises:
        UserInputError: one is missing; the error names it.
    """
    missing = next((part for part in parts if f"{module}.{part}" not in tensors), None)
    if missing is not None:
        raise UserInputError(f"the checkpoint has no tensor {module}.{missing}", where=module)
    return {part: tensors[f"{module}.{part}"] for part in parts}


def section(options: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """A section of a configuration; empty if it is missing or null.

    Raises:
        UserInputError: it is not a JSON object.
    """
    value = options.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise UserInputError(
            f"{name} is {value!r}", where=where, hint="a JSON object is expected there"
        )
    return value or {}


def read_count(
    options: Mapping[str, Any], name: str, where: str, *, top: int | None = None, rows: bool = False
) -> int:
    """An integer of a configuration, from 1 to `top`; with `rows` also `ONE_GROUP_A_ROW`.

    Raises:
        UserInputError: it is missing or has another value.
    """
    value = options.get(name)
    number = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if 1 <= number <= (top or number) or (rows and number == ONE_GROUP_A_ROW):
        return number
    last = "" if top is None else f" to {top}"
    raise UserInputError(
        f"{name} is {'missing' if value is None else repr(value)}",
        where=where,
        hint=f"give an integer from 1{last}{f', or {ONE_GROUP_A_ROW}' if rows else ''}",
    )


def code_width(options: Mapping[str, Any], name: str, where: str) -> int:
    """The number of bits of a code in a configuration.

    Raises:
        UserInputError: it is missing or not supported.
    """
    return read_count(options, name, where, top=max(SUPPORTED_BITS))


def small_numbers(module: str, part: str, values: Tensor, count: int) -> list[int]:
    """Integers that a checkpoint stores as a tensor.

    Raises:
        UserInputError: the dtype or the number of values is different.
    """
    if values.is_floating_point() or values.numel() != count:
        raise UserInputError(
            f"{module}.{part} is {values.dtype} {list(values.shape)}, not {count} integers",
            where=f"{module}.{part}",
        )
    return [int(value) for value in values.flatten().tolist()]


def check_matrix(
    module: str, part: str, values: Tensor, dtype: torch.dtype | None, form: str
) -> None:
    """Check that a tensor has two axes and a dtype (with None: a floating one).

    Raises:
        UserInputError: it does not, or is empty; `form` describes what is expected.
    """
    fits = values.is_floating_point() if dtype is None else values.dtype == dtype
    if not fits or values.dim() != 2 or values.numel() == 0:
        wanted = "floating" if dtype is None else str(dtype).removeprefix("torch.")
        raise UserInputError(
            f"{module}.{part} is {values.dtype} {list(values.shape)}, not {wanted} {form}",
            where=f"{module}.{part}",
        )


def check_shapes(name: str, codes: Tensor, group_size: int, **parts: Tensor) -> None:
    """Check that scales and zero-points have a floating value for each row and group, `[N, L]`.

    Raises:
        UserInputError: one does not; the error names the tensor and both shapes.
    """
    wanted = [codes.shape[0], group_count(codes.shape[1], group_size)]
    for part, values in parts.items():
        if list(values.shape) != wanted or not values.is_floating_point():
            raise UserInputError(
                f"{name}.{part} is {values.dtype} {list(values.shape)}, and its codes "
                f"{list(codes.shape)} in groups of {group_size} need floating {wanted}",
                where=f"{name}.{part}",
                hint="the checkpoint is inconsistent: fetch it again",
            )


def column_order(name: str, g_idx: Tensor | None, k: int, group: int) -> Tensor | None:
    """The order of columns in which groups are contiguous; None if they are already.

    Args:
        name: Name of the tensor.
        g_idx: The group of each column, `[K]`; None if the checkpoint has none.
        k: Number of columns.
        group: Number of columns in a group.

    Raises:
        UserInputError: `g_idx` has another length or does not hold integers.
        UnsupportedError: its groups, except for the last, have different sizes.
    """
    if g_idx is None:
        return None
    if g_idx.shape != (k,) or g_idx.is_floating_point():
        raise UserInputError(
            f"{name} is {g_idx.dtype} {list(g_idx.shape)}, and there are {k} columns", where=name
        )
    plain, stored = torch.arange(k) // group, g_idx.long()
    if torch.equal(stored, plain):
        return None
    order = torch.argsort(stored, stable=True)
    if not torch.equal(stored[order], plain):
        raise UnsupportedError(
            f"the groups of {name} are not of {group} columns each",
            where=name,
            hint="adapters fold into groups of one size",
        )
    return order


def missing_order(name: str, promise: str) -> UserInputError:
    """The error for a configuration that states an order of columns without a tensor of it."""
    return UserInputError(
        f"the checkpoint has no tensor {name}, and {CONFIG} says {promise}: the order of the "
        "columns is not known",
        where=name,
        hint="fetch the checkpoint again, or quantize the float model without that option",
    )


def affine_of(
    name: str, codes: Tensor, scale: Tensor, offset: Tensor, bits: int, g: int
) -> GroupAffine:
    """Validated codes with float32 scale and offset.

    Raises:
        UserInputError: they are not valid; the error names the module.
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


def widened_notes(
    weights: Mapping[str, CheckpointWeight], bits: Mapping[str, int]
) -> tuple[str, ...]:
    """A note on codes that are kept in more bits than in the checkpoint."""
    wide = [name for name, stored in weights.items() if stored.affine.bits != bits[name]]
    if not wide:
        return ()
    first = wide[0]
    return (
        f"{len(wide)} weights keep their {bits[first]}-bit codes in "
        f"{weights[first].affine.bits} bits each",
    )
