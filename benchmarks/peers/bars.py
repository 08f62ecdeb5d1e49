"""Bars as SVG text: one panel for each figure, one row for each variant, one bar for each count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_LABELS, _PANEL, _GAP, _TOP, _BAR, _ROW = 190, 300, 60, 70, 9, 28
_COLOURS = ("#4477aa", "#99bbdd", "#ddddee")


@dataclass(frozen=True)
class Panel:
    """One figure of all variants.

    Attributes:
        title: Above the panel, with the unit.
        values: Name → values, one for each series; None where there is none.
    """

    title: str
    values: Mapping[str, Sequence[float | None]]


def bars_svg(panels: Sequence[Panel], *, title: str, series: Sequence[str]) -> str:
    """Panels next to each other over the same rows, which the first panel names and orders."""
    names = list(panels[0].values)
    width = _LABELS + len(panels) * (_PANEL + _GAP)
    height = _TOP + _ROW * len(names) + 20
    parts = [_text(10, 24, title, size=15)]
    for number, name in enumerate(series):
        left = _LABELS + number * 110
        parts.append(f'<rect x="{left}" y="34" width="10" height="10" fill="{_COLOURS[number]}"/>')
        parts.append(_text(left + 14, 43, name))
    for row, name in enumerate(names):
        parts.append(_text(_LABELS - 8, _TOP + _ROW * row + 14, name, anchor="end"))
    for number, panel in enumerate(panels):
        parts += _panel(panel, names, _LABELS + number * (_PANEL + _GAP))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _panel(panel: Panel, names: Sequence[str], left: float) -> list[str]:
    """Title, and a bar with its value for each that has one."""
    most = max((v for values in panel.values.values() for v in values if v is not None), default=1)
    parts = [_text(left, _TOP - 8, panel.title, size=13)]
    for row, name in enumerate(names):
        for number, value in enumerate(panel.values.get(name, ())):
            if value is None:
                continue
            top, wide = _TOP + _ROW * row + (_BAR + 1) * number, _PANEL * value / most
            parts.append(
                f'<rect x="{left}" y="{top}" width="{wide:.1f}" height="{_BAR}" '
                f'fill="{_COLOURS[number]}"/>'
            )
            parts.append(_text(left + wide + 4, top + _BAR, f"{value:.4g}", size=10))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )
