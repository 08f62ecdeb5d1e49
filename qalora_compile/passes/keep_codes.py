"""Which weights keep the codes that their checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qalora_compile.ir.program import Program
from qalora_compile.ir.stored_codes import StoredCodes, StoredWeight
from qalora_compile.passes.assign_bits import AssignBits
from qalora_compile.passes.base import Pass
from qalora_compile.passes.choices import format_choices
from qalora_compile.passes.corrections import float_weights
from qalora_compile.passes.sort_columns import SortColumns


@dataclass(frozen=True)
class KeptCodes:
    """The codes of a program's weights.

    Attributes:
        weights: By `Site.path`: one matrix, or one for each expert.
    """

    weights: dict[str, tuple[StoredWeight, ...]]

    @property
    def choices(self) -> AssignBits:
        """The pass that plans their bits and group sizes."""
        first = {path: held[0].affine for path, held in self.weights.items()}
        texts = {path: f"{affine.bits}/{affine.group_size}" for path, affine in first.items()}
        return AssignBits(choices=format_choices(texts))

    @property
    def sorting(self) -> SortColumns | None:
        """The pass that sorts the columns of those whose groups lie apart; None: none do."""
        owners: dict[str, str] = {}
        orders: dict[str, Tensor] = {}
        first: dict[bytes, str] = {}
        for path, held in self.weights.items():
            order = held[0].order
            if order is None:
                continue
            owner = first.setdefault(order.numpy().tobytes(), path)
            orders.setdefault(owner, order)
            owners[path] = owner
        return SortColumns(owners=format_choices(owners), orders=orders) if owners else None

    @property
    def steps(self) -> list[Pass]:
        """The passes that go before quantize-groups."""
        steps = [self.sorting, self.choices if self.weights else None]
        return [step for step in steps if step is not None]

    @property
    def reasons(self) -> dict[str, str]:
        """Why, by path."""
        return {path: f"{held[0].form}, as stored" for path, held in self.weights.items()}


def keep_codes(annotated: Program, codes: StoredCodes) -> KeptCodes:
    """Find the weights to quantize among the codes of their checkpoint.

    Args:
        annotated: With the float weights that a reader made of the codes.
        codes: Of the checkpoint.

    Raises:
        PreconditionError: a weight has no values yet.
    """
    found = {}
    for path, weight in float_weights(annotated).items():
        held = _matrices(weight, codes)
        if held is not None:
            found[path] = held
    return KeptCodes(found)


def _matrices(weight: Tensor, codes: StoredCodes) -> tuple[StoredWeight, ...] | None:
    """The codes of every matrix of a weight, or None where one has none, or others are unlike."""
    held = []
    for matrix in weight.reshape(-1, *weight.shape[-2:]):
        one = codes.find(matrix)
        if one is None:
            return None
        held.append(one)
    forms = {(one.form, one.affine.bits, one.affine.group_size) for one in held}
    alone = len(held) == 1 or all(one.order is None for one in held)
    return tuple(held) if len(forms) == 1 and alone else None
