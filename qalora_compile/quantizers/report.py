"""What quantization lost, layer by layer, told to whoever collects it.

Weights may be quantized long after a pass has run (`ir.deferred`), so reports are announced when
they are made, as progress is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.ir.affine import GroupAffine
from qalora_compile.quantizers.statistics import ActivationStatistics

_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class QuantReport:
    """One weight, or one expert of a stack, quantized.

    Attributes:
        path: Of its site.
        method: How.
        bits: Width of a code.
        group_size: g.
        weights: How many there are.
        weight_sqnr_db: Signal to quantization noise of the weights: higher is better; infinite
            where nothing was lost.
        output_sqnr_db: Of the layer's outputs (bias left out) over the calibration rows; None
            without calibration.
        rows: How many calibration rows there were.
        seconds: What it took.
        notes: What the method had to say, for example that damping was raised.
    """

    path: str
    method: str
    bits: int
    group_size: int
    weights: int
    weight_sqnr_db: float
    output_sqnr_db: float | None
    rows: int | None
    seconds: float
    notes: tuple[str, ...] = ()


_collected: ContextVar[list[QuantReport] | None] = ContextVar("qalora_reports", default=None)


@contextmanager
def collecting_reports() -> Iterator[list[QuantReport]]:
    """A list that grows by a report for each weight that is quantized in the block."""
    reports: list[QuantReport] = []
    token = _collected.set(reports)
    try:
        yield reports
    finally:
        _collected.reset(token)


def announce_report(make: Callable[[], QuantReport]) -> None:
    """Make a report and hand it to whoever collects; nothing is measured where nobody does."""
    reports = _collected.get()
    if reports is not None:
        reports.append(make())


def measure_sqnr(
    weight: Tensor, affine: GroupAffine, statistics: ActivationStatistics | None
) -> tuple[float, float | None]:
    """Signal to quantization noise of a weight `[N, K]`, and of the layer's outputs, in decibels.

    Works on some rows at a time: it takes no memory of the weight's size.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    parts = (weight.detach(), affine.codes, affine.scale, affine.offset)
    for part, codes, scale, offset in zip(*(each.split(rows) for each in parts), strict=True):
        found = GroupAffine(codes, scale, offset, affine.bits, affine.group_size).dequantize()
        wide = part.double()
        pair = (wide, wide - found.double())
        sums[:2] += torch.stack([each.square().sum() for each in pair])
        if statistics is not None:
            sums[2:] += torch.tensor([statistics.output_error(each) for each in pair])
    weights, lost, outputs, outputs_lost = sums.tolist()
    return _decibels(weights, lost), (
        None if statistics is None else _decibels(outputs, outputs_lost)
    )


def _decibels(signal: float, noise: float) -> float:
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
