"""Roots of attention's scale: exports multiply queries and keys by √(1 / √D), rounded to float32.

The square of the rounded root is not the scale itself but differs by a rounding; that it stands for
the scale is a condition of the proof.
"""

from __future__ import annotations

import numpy as np

from qalora_compile.verify.proof.symbolic.expression import (
    FUNCTION,
    PRODUCT,
    Expr,
    function,
    mul,
    number,
)

ROOT = "root"
SQUARED = (
    "the factors √(1 / √D) of queries and keys, rounded to float32, have the product 1 / √D, from "
    "which it differs by less than 2⁻²²"
)
_WIDEST = 4096


def root(value: float) -> Expr | None:
    """√(1 / √D) for the number that float32 holds in its place; None for other numbers."""
    if not 0 < value < 1:
        return None
    width = round(value**-4)
    scale = float(np.float32(width**-0.5))
    nearest = {float(np.float32(width**-0.25)), float(np.sqrt(np.float32(scale)))}
    if width > _WIDEST or value not in nearest or value * value == scale:
        return None
    return function(ROOT, number(scale))


def squared(value: Expr) -> Expr:
    """A product with the scale in place of each pair of its roots."""
    if value.op != PRODUCT:
        return value
    kept, known = [number(value.detail[0])], False
    for one, power in zip(value.args, value.detail[1:], strict=True):
        pairs = power // 2 if is_root(one) else 0
        known = known or pairs > 0
        kept += [one.operand] * pairs if pairs else []
        kept += [one] * (power - 2 * pairs)
    return mul(*kept) if known else value


def is_root(value: Expr) -> bool:
    """Whether it is such a root."""
    return value.op == FUNCTION and value.detail == ROOT
