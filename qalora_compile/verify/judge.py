"""The judgement of one value: its error against the error that float rounding alone makes.

With T the value of the reference in float64, A the reference at working precision and B the
candidate, on the same inputs:

    own   = max |A − T|        what rounding does to the reference itself
    error = max |B − T|        what the candidate is off
    floor = max(own, u · max |T|, 2⁻¹²⁶)
    ratio = error / floor

u is the unit of rounding of the working precision (2⁻²⁴ for float32): no result can be asked to be
nearer than that. Below the least normal number of float32 a runtime may take values for zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PASS, AMBIGUOUS, FAIL = "PASS", "AMBIGUOUS", "FAIL"
EXPLAINED = 16.0
"""Up to this ratio rounding explains an error: the same sums, taken in another order, round
otherwise. What is seen between right exports and programs stays below it (docs/verify.md)."""
BEYOND = 128.0
"""From this ratio on rounding is no explanation. A mistake is orders of magnitude larger: float16
somewhere is 8192 roundings of float32."""
_LEAST_NORMAL = 2.0**-126
_BITS_LOST = 14
"""Where the reference has lost so many bits of its own, it has no value to hold others to."""
UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Judgement:
    """What was found of a value on one input.

    Attributes:
        own: `max |A − T|`.
        error: `max |B − T|`; infinite where B is not finite and A is.
        scale: `max |T|`.
        ratio: `error / floor`.
        judged: How many elements were compared.
        undefined: How many were not: the reference is not finite there, has lost 14 bits, or they
            belong to padding, where the candidate has to be finite and no more.
        problem: Why nothing could be compared, or "".
    """

    own: float
    error: float
    scale: float
    ratio: float
    judged: int
    undefined: int
    problem: str = ""

    @property
    def verdict(self) -> str:
        """PASS, AMBIGUOUS or FAIL; AMBIGUOUS too where there was nothing to judge."""
        if self.problem or math.isinf(self.ratio):
            return FAIL
        if not self.judged and self.undefined:
            return AMBIGUOUS
        return verdict_of(self.ratio)


def verdict_of(ratio: float) -> str:
    """PASS up to `EXPLAINED`, FAIL from `BEYOND` on, AMBIGUOUS between."""
    if ratio <= EXPLAINED:
        return PASS
    return AMBIGUOUS if ratio < BEYOND else FAIL


def judge(
    exact: Tensor, own: Tensor, found: Tensor, unit: float, padding: Tensor | None = None
) -> Judgement:
    """Judge a value of the candidate.

    Args:
        exact: T, in float64 (or of a dtype that is not floating, where equality is asked for).
        own: A.
        found: B.
        unit: u.
        padding: True at elements that belong to padding; broadcasts to the value.
    """
    if found.shape != exact.shape and found.numel() == exact.numel():
        found = found.reshape(exact.shape)  # the same rows, flattened or not
    if found.shape != exact.shape:
        text = f"shapes {list(exact.shape)} and {list(found.shape)} differ"
        return Judgement(0.0, math.inf, 0.0, math.inf, 0, 0, text)
    t, a, b = exact.double(), own.double(), found.double()
    finite = torch.isfinite(t) & torch.isfinite(a)
    defined = finite if padding is None else finite & ~padding
    scale, own_error = _largest(t, defined), _largest(a - t, defined)
    undefined = int((~defined).sum())
    lost = own_error > 2.0**_BITS_LOST * unit * scale and own_error > _LEAST_NORMAL
    if bool((finite & ~torch.isfinite(b)).any()):
        return Judgement(own_error, math.inf, scale, math.inf, int(defined.sum()), undefined)
    if lost or not bool(defined.any()):
        return Judgement(own_error, math.nan, scale, 0.0, 0, t.numel())
    error = _largest(b - t, defined)
    floor = max(own_error, unit * scale, _LEAST_NORMAL)
    return Judgement(own_error, error, scale, error / floor, int(defined.sum()), undefined)


def _largest(values: Tensor, where: Tensor) -> float:
    chosen = values[where]
    return float(chosen.abs().max()) if chosen.numel() else 0.0
