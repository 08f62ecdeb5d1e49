"""A scatter plot as SVG text, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 760, 440, 70, 40, 170, 55
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#555555")


@dataclass(frozen=True)
class Point:
    """One mark: where, of which series, and what it says when pointed at."""

    x: float
    y: float
    series: str
    remark: str


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        ends = self.low, self.high, value
        low, high, at = map(math.log, ends) if self.logarithmic else ends
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            ratio = self.high / self.low
            return [self.low * ratio ** (i / 5) for i in range(6)]
        return [self.low + i * (self.high - self.low) / 5 for i in range(6)]


def scatter_svg(
    points: Sequence[Point],
    *,
    title: str,
    x: str,
    y: str,
    line: float | None = None,
) -> str:
    """Marks in one colour a series, with a legend; the vertical axis is logarithmic.

    Args:
        points: At least one; heights are positive.
        title: Above.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        line: Height of a dashed line, of what is compared with.
    """
    across = _axis([p.x for p in points], _LEFT, _WIDTH - _RIGHT, logarithmic=False)
    heights = [p.y for p in points] + ([] if line is None else [line])
    up = _axis(heights, _HEIGHT - _BOTTOM, _TOP, logarithmic=True)
    names = list(dict.fromkeys(p.series for p in points))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    parts = [*_frame(across, up, title, x, y)]
    if line is not None:
        at = f"{up.place(line):.1f}"
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}" stroke="#555" '
            'stroke-dasharray="5 4"/>'
        )
    parts += [
        f'<circle cx="{across.place(point.x):.1f}" cy="{up.place(point.y):.1f}" r="5" '
        f'fill="{colours[point.series]}" fill-opacity="0.8">'
        f"<title>{escape(f'{point.series}, {point.remark}: {point.y:.4g}')}</title></circle>"
        for point in points
    ]
    for index, name in enumerate(names):
        height = _TOP + 20 * index
        left = _WIDTH - _RIGHT + 20
        parts.append(f'<circle cx="{left}" cy="{height}" r="5" fill="{colours[name]}"/>')
        parts.append(_text(left + 12, height + 4, name))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _axis(values: Sequence[float], start: float, stop: float, *, logarithmic: bool) -> _Axis:
    """An axis with some room around the values."""
    low, high = min(values), max(values)
    if logarithmic:
        room = (high / low) ** 0.05 if high > low else 1.1
        return _Axis(low / room, high * room, start, stop, logarithmic=True)
    gap = 0.05 * (high - low) or 1.0
    return _Axis(low - gap, high + gap, start, stop)


def _frame(across: _Axis, up: _Axis, title: str, x: str, y: str) -> list[str]:
    """Title, axes and their ticks."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        _text(_LEFT, 22, title, size=15),
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="black"/>',
        _text((_LEFT + right) / 2, _HEIGHT - 12, x, anchor="middle"),
        f'<g transform="translate(16 {(_TOP + bottom) / 2}) rotate(-90)">'
        f"{_text(0, 0, y, anchor='middle')}</g>",
    ]
    for tick in across.ticks():
        parts += [_text(across.place(tick), bottom + 18, f"{tick:.4g}", anchor="middle")]
    for tick in up.ticks():
        parts += [_text(_LEFT - 6, up.place(tick) + 4, f"{tick:.3g}", anchor="end")]
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )
