"""Reports the quantization error of each layer to collectors.

Weights may be quantized long after a pass has run (`ir.lazy_tensor`), so reports are delivered when
they are made, like progress.
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
    """The quantization of one weight, or of one expert of a stack.

    Attributes:
        path: Path of its site.
        method: Name of the method.
        bits: Width of a code.
        group_size: Group size g.
        weights: Number of weights.
        weight_sqnr_db: Signal to quantization noise ratio of the weights: higher is better;
            infinite without any error.
        output_sqnr_db: The same for the layer's outputs (without bias) over the calibration rows;
            None without calibration.
        rows: Number of calibration rows.
        seconds: Duration.
        notes: Notes of the method, for example that damping was raised.
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
    """A list that receives a report for each weight that is quantized in the block."""
    reports: list[QuantReport] = []
    token = _collected.set(reports)
    try:
        yield reports
    finally:
        _collected.reset(token)


def announce_report(make: Callable[[], QuantReport]) -> None:
    """Make a report and deliver it to collectors; without any, nothing is measured."""
    reports = _collected.get()
    if reports is not None:
        reports.append(make())


def measure_sqnr(
    weight: Tensor, affine: GroupAffine, statistics: ActivationStatistics | None
) -> tuple[float, float | None]:
    """Signal to quantization noise of a weight `[N, K]`, and of the layer's outputs, in decibels.

    Works on a block of rows at a time, without memory of the weight's size.
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
