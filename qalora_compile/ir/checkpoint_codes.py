"""Codes that a checkpoint holds, found again by the float rows that they stand for.

Readers of foreign checkpoints give a model in float, whose weights may be renamed, transposed,
split, stacked or, for rotary heads, reordered by rows. Whatever was done to them, a row of a weight
is still the row that some codes stand for: by its values it is found without a table of names for
every architecture and format.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qalora_compile.ir.affine import GroupAffine

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class CheckpointWeight:
    """A matrix as a checkpoint holds it.

    Attributes:
        affine: Its codes, `[N, K]`, scales and offsets.
        order: Where groups of columns lie apart in the weight: column `order[i]` of the weight is
            column i of the codes, `[K]` int64. None: they are as in the weight.
        form: How the checkpoint names that form, for example `Q4_1`.
    """

    affine: GroupAffine
    form: str
    order: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight, `[N, K]`, its columns where they belong."""
        if self.order is None:
            return self.affine.dequantize()
        weight = torch.empty(self.affine.shape, dtype=self.affine.scale.dtype)
        weight[:, self.order] = self.affine.dequantize()
        return weight


@dataclass(frozen=True)
class _Place:
    """A row: which tensor, and which row of it."""

    tensor: int
    row: int


_Kind = tuple[int, int, int, str, bytes]


class CheckpointCodes:
    """The quantized tensors of a checkpoint."""

    def __init__(self) -> None:
        self._tensors: list[CheckpointWeight] = []
        self._rows: dict[_Kind, dict[int, _Place]] = defaultdict(dict)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._tensors)

    def add(self, stored: CheckpointWeight) -> None:
        """Take the codes of one tensor; scale and offset are float32.

        Raises:
            UserInputError: the codes are not valid (`GroupAffine.validate`).
        """
        stored.affine.validate()
        places = self._rows[_kind(stored)]
        number = len(self._tensors)
        self._tensors.append(stored)
        for row, key in enumerate(_row_keys(stored.dequantize())):
            places.setdefault(key, _Place(number, row))

    def find(self, matrix: Tensor) -> CheckpointWeight | None:
        """The codes of a weight, row by row, or None where a row has none.

        Args:
            matrix: `[N, K]`. What is found dequantizes to exactly this.
        """
        if matrix.dtype != torch.float32:
            return None
        kinds = [kind for kind in self._rows if kind[0] == matrix.shape[1]]
        keys = _row_keys(matrix) if kinds else []
        for kind in kinds:
            known = self._rows[kind]
            places = [known[key] for key in keys if key in known]
            if len(places) == len(keys):
                found = self._gather(places)
                if torch.equal(found.dequantize(), matrix):
                    return found
        return None

    def _gather(self, places: list[_Place]) -> CheckpointWeight:
        """The rows at places, of one kind."""
        first = self._tensors[places[0].tensor]
        row_of = torch.tensor([place.row for place in places])
        tensor_of = torch.tensor([place.tensor for place in places])

        def rows(name: str) -> Tensor:
            source: Tensor = getattr(first.affine, name)
            part = source.new_empty((len(places), source.shape[1]))
            for number in tensor_of.unique().tolist():
                mine = tensor_of == number
                part[mine] = getattr(self._tensors[number].affine, name)[row_of[mine]]
            return part

        affine = replace(
            first.affine, codes=rows("codes"), scale=rows("scale"), offset=rows("offset")
        )
        return CheckpointWeight(affine, first.form, first.order)


def _kind(stored: CheckpointWeight) -> _Kind:
    """K, bits, group size, form and order: rows of one kind make one matrix."""
    affine = stored.affine
    order = b"" if stored.order is None else stored.order.numpy().tobytes()
    return affine.codes.shape[1], affine.bits, affine.group_size, stored.form, order


def _row_keys(matrix: Tensor) -> list[int]:
    """A number for each row, by its bytes; zeros of both signs count alike."""
    keys: list[int] = []
    for part in matrix.detach().split(max(1, _CHUNK_ELEMENTS // matrix.shape[1])):
        keys += [hash(row.tobytes()) for row in (part + 0.0).numpy()]
    return keys
