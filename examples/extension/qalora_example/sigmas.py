"""A quantizer that cuts the range of each group at some standard deviations from its mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile import QuantSpec, extend


@dataclass(frozen=True)
class QuantizeSigmas:
    """Levels between `mean - sigmas · std` and `mean + sigmas · std`, inside the group's range.

    Attributes:
        sigmas: The option. Each choice is registered under a name of its own.
    """

    sigmas: float

    def __call__(
        self, weight: Tensor, spec: QuantSpec, statistics: extend.ActivationStatistics | None
    ) -> extend.QuantizedWeight:
        """Quantize `weight` `[N, K]`, group by group."""
        storage = torch.float64 if weight.dtype == torch.float64 else torch.float32
        top = 2**spec.width - 1
        codes, scales, offsets = [], [], []
        for part in weight.detach().double().split(spec.group, dim=1):
            mean, std = part.mean(1, keepdim=True), part.std(1, correction=0, keepdim=True)
            low = torch.maximum(part.amin(1, keepdim=True), mean - self.sigmas * std)
            high = torch.minimum(part.amax(1, keepdim=True), mean + self.sigmas * std)
            scale = ((high - low).clamp_min(0) / top).to(storage)
            offset = low.to(storage)
            step = torch.where(scale == 0, torch.ones_like(scale), scale).double()
            level = ((part - offset.double()) / step).round().clamp(0, top)
            codes.append(level.to(torch.uint8))
            scales.append(scale)
            offsets.append(offset)
        affine = extend.GroupAffine(
            torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(offsets, 1), spec.width, spec.group
        )
        return extend.QuantizedWeight(affine, (f"cut at {self.sigmas:g} standard deviations",))


TWO = extend.Method(quantize=QuantizeSigmas(2.0), max_error=1.0)
THREE = extend.Method(quantize=QuantizeSigmas(3.0), max_error=1.0)
