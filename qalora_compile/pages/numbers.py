"""Numbers as people read them: grouped digits, four significant digits, percentages."""

from __future__ import annotations

import math

_DIGITS = 4
_SMALL, _LARGE = 1e-4, 1e15


def number_text(value: float) -> str:
    """An integer with its digits in groups of three; another number with four significant digits.

    Numbers below 1e-4 are written with a power of ten (`3.2·10⁻⁶`).
    """
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    size = abs(value)
    if size and not _SMALL <= size < _LARGE:
        return _scientific(value, _DIGITS)
    if size >= 10 ** (_DIGITS - 1):
        return f"{value:,.0f}"
    return f"{value:.{_DIGITS}g}"


def short_text(value: float) -> str:
    """A number in at most six characters or so, for a cell of a heat map."""
    size = abs(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞"
    if value == 0:
        return "0"
    if size < 0.005 or size >= 1e4:
        return _scientific(value, 1)
    return f"{value:.{0 if size >= 10 else 1 if size >= 1 else 2}f}"


def percent(fraction: float) -> str:
    """A fraction as a percentage: `92.5 %`."""
    return f"{100 * fraction:.1f} %"


def _scientific(value: float, digits: int) -> str:
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}·10{raised}"
