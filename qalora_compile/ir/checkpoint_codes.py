"""Find the codes of a checkpoint again by the float rows that they dequantize to.

Readers of other libraries' checkpoints return a float model, whose weights may be renamed,
transposed, split, stacked or, for rotary heads, reordered by rows. A row of a weight still equals
the row that some codes dequantize to, so its values identify it without a table of names for every
architecture and format.
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
    """A quantized matrix of a checkpoint.

    Attributes:
        affine: Its codes, `[N, K]`, scales and offsets.
        order: The activation order, `[K]` int64: column `order[i]` of the weight is column i of the
            codes. None: columns are as in the weight.
        form: The checkpoint's name for the format, for example `Q4_1`.
    """

    affine: GroupAffine
    form: str
    order: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight, `[N, K]`, with its columns in the model's order."""
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
        """The rows at these places, all of one kind."""
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
    """A hash of the bytes of each row; −0 and 0 are equal."""
    keys: list[int] = []
    for part in matrix.detach().split(max(1, _CHUNK_ELEMENTS // matrix.shape[1])):
        keys += [hash(row.tobytes()) for row in (part + 0.0).numpy()]
    return keys
