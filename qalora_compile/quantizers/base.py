"""The protocol of a quantizer, and `Method`, its entry in the registry."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qalora_compile.config import QuantSpec
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Call
from qalora_compile.quantizers.statistics import ActivationStatistics


@dataclass(frozen=True)
class QuantizedWeight:
    """The result of quantizing a weight, with notes."""

    affine: GroupAffine
    notes: tuple[str, ...] = ()


class Quantizer(Protocol):
    """Chooses codes, scale and offset of a weight."""

    def __call__(
        self, weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics | None
    ) -> QuantizedWeight:
        """Quantize a finite `weight` `[N, K]`, floating, in groups along K.

        Scale and offset are float64 for a float64 weight, else float32. `statistics` are those of
        the layer's input, or None without calibration.
        """


class Finish(Protocol):
    """Improves the quantized weights of a program together, once each has been quantized."""

    def __call__(
        self,
        source: Program,
        quantized: Program,
        spec: QuantSpec,
        calls: Sequence[Call],
        *,
        keep: Collection[str],
        checkpoints: Path | None,
    ) -> Program:
        """A program with the graph of `quantized` and other codes, scales or offsets.

        Args:
            source: The float program, at stage `annotated`.
            quantized: The same program, quantized; it stays unchanged.
            spec: The options of the method; bits and group sizes are those of the graph.
            calls: Calibration calls.
            keep: Paths of weights that stay.
            checkpoints: Where work that takes long may be saved, to go on with it if it is killed.
        """


Check = Callable[[Program, Sequence[Call]], None]
"""Refuses a float program, or calibration calls, that `Finish` cannot use."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A value of `QuantSpec.method`: a quantizer and its properties.

    A method with options is registered once for each choice of them.

    Attributes:
        quantize: Chooses codes, scale and offset of one weight.
        needs_data: Whether it needs statistics of the layer's input. Without calibration data it is
            refused, and stacked experts, which have none, are quantized by `hqq` instead.
        max_error: Largest change of a weight relative to the range of its group; None: half a step
            between 2^bits levels, `0.5 / (2^bits - 1)`. It holds for `quantize` alone.
        finish: Improves all weights together after that; it needs calibration data.
        check: Called before anything else, where there are calibration data.
    """

    quantize: Quantizer
    needs_data: bool = False
    max_error: float | None = None
    finish: Finish | None = None
    check: Check | None = None
