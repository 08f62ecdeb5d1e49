"""The protocol of a quantizer, and the lookup of quantizers by name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from qalora_compile.config import QuantSpec
from qalora_compile.errors import InternalError
from qalora_compile.ir.affine import GroupAffine


class Quantizer(Protocol):
    """Chooses codes, scale and offset of a weight."""

    def __call__(self, weight: Tensor, spec: QuantSpec) -> GroupAffine:
        """Quantize a finite `weight` `[N, K]`, floating, in groups along K.

        Scale and offset are float64 for a float64 weight, else float32.
        """


def get_quantizer(method: str) -> Quantizer:
    """The quantizer of `QuantSpec.method`."""
    from qalora_compile.quantizers.minmax import quantize_minmax

    methods: dict[str, Quantizer] = {"minmax": quantize_minmax}
    if method not in methods:
        raise InternalError(f"the method {method!r} is configurable but has no quantizer")
    return methods[method]
