"""The check of one value: its error against the error that float rounding alone makes.

On the same inputs, T is the reference in float64, Aᵢ the reference at working precision (as it is,
and with every result rounded up or down at random), and B the candidate:

    own   = max |Aᵢ − T|       what rounding does to the reference itself
    error = max |B − T|        the error of the candidate
    floor = max(own, u · max |T|, 2⁻¹²⁶)
    ratio = error / floor

u is the unit roundoff of the working precision (2⁻²⁴ for float32): no result can be required to be
more accurate. A runtime may flush values below the least normal number of float32 to zero. A single
evaluation may be accurate by chance, for example if one element is far larger than all others; the
random ones account for that (Monte Carlo arithmetic: D. S. Parker, 1997).

Integers and booleans must be equal wherever every Aᵢ agrees with T.

A value may be ill-conditioned on an input: a softmax over scores of 10⁵ selects one of two keys
whose scores agree to the last bits, and other kernels, which take the sums in another order, select
the other key. One rounding of each result may miss that. So where `error` is not explained, the
reference runs again with every result off by 16 roundings. If that changes the value by at least
`error`, and by more than twice what 16 roundings of a well-conditioned value would change, the
value is not compared on this input, as where the reference itself has lost 14 bits. A mistake in a
well-conditioned value is still found: the change is then 16 times `own`, not more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.ir.signature import dtype_name
from qalora_compile.verdict import Verdict
from qalora_compile.verify.compare import EXPLAINED, verdict_of

_LEAST_NORMAL = 2.0**-126
_BITS_LOST = 14
"""Elements of which the reference itself has lost this many bits are not compared."""
SENSITIVITY = 16
"""How many roundings each result of the reference is off where its conditioning is measured."""
UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class BoundCheck:
    """The check of a value on one input.

    Attributes:
        own: `max |Aᵢ − T|`.
        error: `max |B − T|`; infinite if B is not finite where A is.
        scale: `max |T|`.
        ratio: `error / floor`.
        checked: How many elements were compared.
        undefined: How many were not, because the reference is not finite or has lost 14 bits there,
            or because they are padding, where the candidate only has to be finite.
        problem: Why nothing could be compared, or which integers are not equal, or "".
    """

    own: float
    error: float
    scale: float
    ratio: float
    checked: int
    undefined: int
    problem: str = ""

    @property
    def verdict(self) -> Verdict:
        """EQUAL, UNDECIDED or DIFFERENT; UNDECIDED also if there was nothing to compare."""
        if self.problem or math.isinf(self.ratio):
            return Verdict.DIFFERENT
        if not self.checked and self.undefined:
            return Verdict.UNDECIDED
        return verdict_of(self.ratio)


def check_bound(
    exact: Tensor,
    own: Tensor,
    found: Tensor,
    unit: float,
    padding: Tensor | None = None,
    *,
    as_is: bool = False,
) -> BoundCheck:
    """Check a value of the candidate.

    Args:
        exact: T, in float64 (or of a non-floating dtype, for which equality is required).
        own: `maxᵢ |Aᵢ − T|`, element by element; not finite where an Aᵢ is not finite.
        found: B.
        unit: u.
        padding: True at elements that belong to padding; broadcasts to the value.
        as_is: B must have the shape of T, and be floating if T is, because it is an output. Inside
            a graph, rows may be flattened, and a mask may be stored as numbers.
    """
    problem = _unlike(exact, found, as_is=as_is)
    if problem:
        return without_numbers(problem)
    found = found.reshape(exact.shape)
    if not exact.is_floating_point():
        return _check_integers(exact, own, found, padding)
    t, e, b = exact.double(), own.double(), found.double()
    finite = torch.isfinite(t) & torch.isfinite(e)
    defined = finite if padding is None else finite & ~padding
    scale, own_error = _largest(t, defined), _largest(e, defined)
    undefined = int((~defined).sum())
    lost = own_error > 2.0**_BITS_LOST * unit * scale and own_error > _LEAST_NORMAL
    if bool((finite & ~torch.isfinite(b)).any()):
        return BoundCheck(own_error, math.inf, scale, math.inf, int(defined.sum()), undefined)
    if lost or not bool(defined.any()):
        return BoundCheck(own_error, math.nan, scale, 0.0, 0, t.numel())
    error = _largest(b - t, defined)
    floor = max(own_error, unit * scale, _LEAST_NORMAL)
    return BoundCheck(own_error, error, scale, error / floor, int(defined.sum()), undefined)


def unless_ill_conditioned(
    check: BoundCheck, disturbed: Callable[[], BoundCheck], unit: float
) -> BoundCheck:
    """The check, or one that compares nothing if the value is ill-conditioned on this input.

    Args:
        check: What `check_bound` found.
        disturbed: The same check against evaluations whose results are off by `SENSITIVITY`
            roundings; called only if rounding does not explain the error.
        unit: u.
    """
    if check.problem or check.ratio <= EXPLAINED or math.isinf(check.ratio):
        return check
    change = disturbed().own
    well_conditioned = SENSITIVITY * max(check.own, unit * check.scale, _LEAST_NORMAL)
    if change < max(check.error, 2 * well_conditioned):
        return check
    total = check.checked + check.undefined
    return BoundCheck(change, check.error, check.scale, 0.0, 0, total)


def rounding_ratio(
    exact: Tensor, own: Tensor, found: Tensor, unit: float, padding: Tensor | None = None
) -> float:
    """The candidate's error as a multiple of what rounding does to the reference.

    Unlike `check_bound` it also compares values of which the reference itself has lost many bits,
    since the candidate is not responsible for an ill-conditioned model. The arguments are those of
    `check_bound`. Integers and booleans give 0 or infinity, as do different shapes.
    """
    if not exact.is_floating_point() or found.shape != exact.shape:
        return check_bound(exact, own, found, unit, padding, as_is=True).ratio
    t, e, b = exact.double(), own.double(), found.double()
    defined = torch.isfinite(t) & torch.isfinite(e)
    if padding is not None:
        defined &= ~padding
    if bool((defined & ~torch.isfinite(b)).any()):
        return math.inf
    floor = max(_largest(e, defined), unit * _largest(t, defined), _LEAST_NORMAL)
    return _largest(b - t, defined) / floor


def without_numbers(problem: str) -> BoundCheck:
    """The verdict DIFFERENT without numbers, if nothing could be compared."""
    return BoundCheck(0.0, math.inf, 0.0, math.inf, 0, 0, problem)


def _unlike(exact: Tensor, found: Tensor, *, as_is: bool) -> str:
    """Why the two cannot be compared, or ""."""
    flattened = not as_is and found.numel() == exact.numel()
    if found.shape != exact.shape and not flattened:
        return f"shapes {list(exact.shape)} and {list(found.shape)} differ"
    if as_is and found.is_floating_point() != exact.is_floating_point():
        return f"holds {dtype_name(found.dtype)} where the reference has {dtype_name(exact.dtype)}"
    return ""


def _check_integers(
    exact: Tensor, own: Tensor, found: Tensor, padding: Tensor | None
) -> BoundCheck:
    """Compare integers or booleans; undefined where rounding decides them, as in an argmax."""
    defined = own == 0 if padding is None else (own == 0) & ~padding
    # Type promotion would convert integers compared with a float32 to float32.
    other = found.double() if found.is_floating_point() else found
    wrong = (other != (exact.double() if found.is_floating_point() else exact)) & defined
    scale, checked = _largest(exact.double(), defined), int(defined.sum())
    undefined = defined.numel() - checked
    if not bool(wrong.any()):
        return BoundCheck(0.0, 0.0, scale, 0.0, checked, undefined)
    at = wrong.nonzero()[0].tolist()
    first, second = (value[tuple(at)].item() for value in (exact, found))
    text = (
        f"{int(wrong.sum())} of {checked} are not equal, the first {second}, not {first}, at {at}"
    )
    error = _largest(found.double() - exact.double(), wrong)
    return BoundCheck(0.0, error, scale, math.inf, checked, undefined, text)


def _largest(values: Tensor, where: Tensor) -> float:
    chosen = values[where]
    return float(chosen.abs().max()) if chosen.numel() else 0.0
