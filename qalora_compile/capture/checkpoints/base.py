"""What readers of quantized checkpoints share: the protocol, and codes out of a stream of bits."""

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
    """What a reader makes of the tensors of a checkpoint.

    Attributes:
        weights: Quantized weights by the name of their module.
        used: Names of the tensors that they were made of.
        notes: What the user should know.
        turned: Modules whose parameter is `[K, N]`.
    """

    weights: dict[str, CheckpointWeight]
    used: frozenset[str]
    notes: tuple[str, ...] = ()
    turned: frozenset[str] = frozenset()


CONFIG = "config.json"
"""Where options are that are said of the whole checkpoint."""
ONE_GROUP_A_ROW = -1
"""As a group size: each row of a weight is one group."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class OpenFolder:
    """The folder that a checkpoint is read from.

    Attributes:
        path: Of the folder.
        modules: The modules that `config.json` describes, without weights, by every name of theirs.
        zero_points: What the user says of how zero-points are stored; None: nothing.
    """

    path: Path
    modules: Callable[[], Mapping[str, nn.Module]]
    zero_points: str | None = None


Reader = Callable[[Tensors, Mapping[str, Any], OpenFolder], Decoded]
"""(tensors by name, `config.json`, their folder) → what is in them."""


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


def section(options: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """A part of a configuration; an empty one where it is missing or null.

    Raises:
        UserInputError: it is no object of JSON.
    """
    value = options.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise UserInputError(
            f"{name} is {value!r}", where=where, hint="names with values are wanted there"
        )
    return value or {}


def read_count(
    options: Mapping[str, Any], name: str, where: str, *, top: int | None = None, rows: bool = False
) -> int:
    """A whole number of a configuration, from 1 to `top`; with `rows` also `ONE_GROUP_A_ROW`.

    Raises:
        UserInputError: it is missing, or another value.
    """
    value = options.get(name)
    number = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if 1 <= number <= (top or number) or (rows and number == ONE_GROUP_A_ROW):
        return number
    last = "" if top is None else f" to {top}"
    raise UserInputError(
        f"{name} is {'missing' if value is None else repr(value)}",
        where=where,
        hint=f"an integer from 1{last}{f', or {ONE_GROUP_A_ROW}' if rows else ''} is wanted there",
    )


def code_width(options: Mapping[str, Any], name: str, where: str) -> int:
    """How many bits a code has, by a configuration.

    Raises:
        UserInputError: it is missing, or no width that can be read.
    """
    return read_count(options, name, where, top=max(SUPPORTED_BITS))


def small_numbers(module: str, part: str, values: Tensor, count: int) -> list[int]:
    """Whole numbers that a checkpoint stores as a tensor.

    Raises:
        UserInputError: they are of another dtype, more or fewer.
    """
    if values.is_floating_point() or values.numel() != count:
        raise UserInputError(
            f"{module}.{part} is {values.dtype} {list(values.shape)}, not {count} whole numbers",
            where=f"{module}.{part}",
        )
    return [int(value) for value in values.flatten().tolist()]


def check_matrix(
    module: str, part: str, values: Tensor, dtype: torch.dtype | None, form: str
) -> None:
    """A tensor has two axes and a dtype; None: a floating one.

    Raises:
        UserInputError: it has not, or is empty; `form` says what was wanted.
    """
    fits = values.is_floating_point() if dtype is None else values.dtype == dtype
    if not fits or values.dim() != 2 or values.numel() == 0:
        wanted = "floating" if dtype is None else str(dtype).removeprefix("torch.")
        raise UserInputError(
            f"{module}.{part} is {values.dtype} {list(values.shape)}, not {wanted} {form}",
            where=f"{module}.{part}",
        )


def check_shapes(name: str, codes: Tensor, group_size: int, **parts: Tensor) -> None:
    """Scales and what goes with them have one floating value for each row and group, `[N, L]`.

    Raises:
        UserInputError: one has not; the tensor and both shapes are named.
    """
    wanted = [codes.shape[0], group_count(codes.shape[1], group_size)]
    for part, values in parts.items():
        if list(values.shape) != wanted or not values.is_floating_point():
            raise UserInputError(
                f"{name}.{part} is {values.dtype} {list(values.shape)}, and its codes "
                f"{list(codes.shape)} in groups of {group_size} want floating {wanted}",
                where=f"{name}.{part}",
                hint="the checkpoint is inconsistent: fetch it again",
            )


def column_order(name: str, g_idx: Tensor | None, k: int, group: int) -> Tensor | None:
    """The order of columns in which groups are contiguous; None where they are as they stand.

    Args:
        name: Of the tensor.
        g_idx: The group of each column, `[K]`; None where the checkpoint has none.
        k: How many columns there are.
        group: How many of them are in a group.

    Raises:
        UserInputError: `g_idx` is of another length, or holds no whole numbers.
        UnsupportedError: its groups are not all of one size, the last excepted.
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
    """A refusal: the configuration promises an order of columns, and no tensor says which."""
    return UserInputError(
        f"the checkpoint has no tensor {name}, and {CONFIG} says {promise}: the order of the "
        "columns is not known",
        where=name,
        hint="fetch the checkpoint again, or quantize the float model without that option",
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


def widened_notes(
    weights: Mapping[str, CheckpointWeight], bits: Mapping[str, int]
) -> tuple[str, ...]:
    """A note where codes are kept in more bits than the checkpoint has them in."""
    wide = [name for name, stored in weights.items() if stored.affine.bits != bits[name]]
    if not wide:
        return ()
    first = wide[0]
    return (
        f"{len(wide)} weights keep their {bits[first]}-bit codes in "
        f"{weights[first].affine.bits} bits each",
    )
