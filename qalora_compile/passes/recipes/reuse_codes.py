"""Selection of the weights that keep the codes of their checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.checkpoint_codes import CheckpointCodes, CheckpointWeight
from qalora_compile.ir.program import Program
from qalora_compile.passes.analysis.select_sites import format_choices
from qalora_compile.passes.assign_bits import AssignBits
from qalora_compile.passes.framework.base import Pass
from qalora_compile.passes.recipes.lora_init import float_weights
from qalora_compile.passes.sort_columns import SortColumns

_WITHOUT = "the checkpoint has no codes for it: quantized by the options"
_PROBES = 64
"""Number of rows that are looked up for a weight that was not found completely."""


@dataclass(frozen=True)
class KeptCodes:
    """The codes of a program's weights.

    Attributes:
        weights: By `Site.path`: one matrix, or one for each expert.
        without: Paths of weights to quantize for which the checkpoint has no codes.
    """

    weights: dict[str, tuple[CheckpointWeight, ...]]
    without: tuple[str, ...] = ()

    @property
    def choices(self) -> AssignBits:
        """The pass that plans their bits and group sizes."""
        first = {path: held[0].affine for path, held in self.weights.items()}
        texts = {path: f"{affine.bits}/{affine.group_size}" for path, affine in first.items()}
        return AssignBits(choices=format_choices(texts))

    @property
    def sorting(self) -> SortColumns | None:
        """The pass that sorts weights in activation order; None if there are none."""
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
        """The passes to run before quantize-groups."""
        steps = [self.sorting, self.choices if self.weights else None]
        return [step for step in steps if step is not None]

    @property
    def reasons(self) -> dict[str, str]:
        """The reasons for the plan, by path."""
        kept = {path: f"{held[0].form}, as stored" for path, held in self.weights.items()}
        return kept | dict.fromkeys(self.without, _WITHOUT)


def reuse_codes(annotated: Program, codes: CheckpointCodes) -> KeptCodes:
    """Find the weights to quantize among the codes of their checkpoint.

    Args:
        annotated: A program with the float weights that a reader made from the codes.
        codes: The codes of the checkpoint.

    Raises:
        PreconditionError: a weight has no values yet.
        UnsupportedError: the checkpoint has codes for a weight, and they cannot be kept.
    """
    if not codes:
        return KeptCodes({})
    found, without = {}, []
    for path, weight in float_weights(annotated).items():
        held = _matrices(path, weight, codes)
        if held is None:
            without.append(path)
        else:
            found[path] = held
    return KeptCodes(found, tuple(without))


def _matrices(
    path: str, weight: Tensor, codes: CheckpointCodes
) -> tuple[CheckpointWeight, ...] | None:
    """The codes of every matrix of a weight, or None if there are none.

    Raises:
        UnsupportedError: there are codes, but only for some rows, in different formats, or in
            several orders; or the weight does not have the dtype of dequantized codes.
    """
    if weight.dtype != torch.float32:
        raise UnsupportedError(
            f"the weight is {weight.dtype}, but codes are found by dequantized float32 values",
            where=path,
            hint="leave the model in float32, or quantize it without stored codes",
        )
    matrices = weight.reshape(-1, *weight.shape[-2:])
    found = [codes.find(matrix) for matrix in matrices]
    held = tuple(one for one in found if one is not None)
    if not held and not any(_has_codes(matrix, codes) for matrix in matrices):
        return None
    forms = {f"{h.form} in groups of {h.affine.group_size}" for h in held}
    if len(held) < len(matrices):
        why = "the checkpoint has codes for some of its rows, or in different formats"
    elif len(forms) > 1:
        why = f"its experts are stored in different formats: {', '.join(sorted(forms))}"
    elif len(held) > 1 and any(one.order is not None for one in held):
        why = "its experts are stored in activation order, each in a different one"
    else:
        return held
    raise UnsupportedError(
        f"the codes of a weight cannot be kept: {why}",
        where=path,
        hint="quantize again by giving bits, or without stored codes; or exclude the layer",
    )


def _has_codes(matrix: Tensor, codes: CheckpointCodes) -> bool:
    """Whether some row equals dequantized codes; rows of zeros prove nothing."""
    rows = matrix[:: max(1, len(matrix) // _PROBES)]
    return any(codes.find(row[None]) is not None for row in rows if bool(row.any()))
