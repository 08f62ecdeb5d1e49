"""The protocol of a quantizer, the lookup of quantizers by name, and one weight quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qalora_compile.config import QuantSpec
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.quantizers.statistics import ActivationStatistics


@dataclass(frozen=True)
class QuantizedWeight:
    """What a quantizer made of a weight, and what there is to say about it."""

    affine: GroupAffine
    notes: tuple[str, ...] = ()


class Quantizer(Protocol):
    """Chooses codes, scale and offset of a weight."""

    def __call__(
        self, weight: Tensor, spec: QuantSpec, statistics: ActivationStatistics | None
    ) -> QuantizedWeight:
        """Quantize a finite `weight` `[N, K]`, floating, in groups along K.

        Scale and offset are float64 for a float64 weight, else float32. `statistics` are those of
        the layer's input, or None where there was no calibration.
        """
