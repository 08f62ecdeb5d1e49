"""Charts as SVG text: lines, bars by name, histograms.

The same numbers give the same text. Colours are variables of the page's style, so that charts
follow its dark mode.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from qalora_compile.errors import UserInputError
from qalora_compile.optional import require

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_INK, _FAINT = "#010101", "#020202"
_SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(_SERIES)
}
"""Placeholder colours of a drawing → the page's variables that replace them."""
_NAMED_TICKS = 40
"""With more bars, only every n-th is labelled; tooltips name them all."""
_INCHES = (7.6, 3.0)
_BINS = 60
"""Bins of a histogram, of equal width from the smallest to the largest value."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qalora",
    "font.size": 9,
    "text.parse_math": False,  # names with dollar signs are not formulas
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes:
        svg: An `<svg>` element. Its colours are the variables of `page.css`.
        remarks: Values that are not drawn, and why; the page shows this below the chart.
    """

    svg: str
    remarks: tuple[str, ...] = ()


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    log_y: bool = False,
) -> Chart:
    """Lines through points.

    Args:
        series: Name → x values and y values. A value that is not finite leaves a gap, and so does
            one that is not positive on a logarithmic axis; remarks count them.
        x: Label of the x axis.
        y: Label of the y axis.
        log_y: Whether y is logarithmic.

    Raises:
        UserInputError: there is no series, or one is empty or has the wrong length.
        UnsupportedError: matplotlib is not installed.
    """
    _check_series({name: list(ys) for name, (_, ys) in series.items()})
    for name, (xs, ys) in series.items():
        if len(xs) != len(ys):
            raise UserInputError(f"the series {name} has {len(xs)} x and {len(ys)} y")

    def draw(axes: Any) -> list[str]:
        remarks = []
        for index, (name, (xs, ys)) in enumerate(series.items()):
            kept = [_drawable(v, log_y) for v in ys]
            remarks += _left_out(name, kept, log_y)
            shown = [v if good else math.nan for v, good in zip(ys, kept, strict=True)]
            marker = "o" if sum(kept) < 3 else ""
            axes.plot(list(xs), shown, color=_colour(index), label=name, marker=marker)
        if log_y:
            axes.set_yscale("log")
        return remarks

    return _drawn(draw, x, y, legend=len(series) > 1)


def bar_chart(
    labels: Sequence[str], series: Mapping[str, Sequence[float]], *, y: str, log_y: bool = False
) -> Chart:
    """Bars by name, for example one per layer; the bars of several series are next to each other.

    Args:
        labels: Names of the bars, from left to right. Of more than 40, only some are written; the
            tooltip of a bar shows its name and value.
        series: Name → one value per label. Values that are not finite, or not positive on a
            logarithmic axis, are not drawn; remarks count them.
        y: Label of the y axis.
        log_y: Whether y is logarithmic.

    Raises:
        UserInputError: there is no series, or one is empty or has the wrong length.
        UnsupportedError: matplotlib is not installed.
    """
    _check_series(series)
    for name, values in series.items():
        if len(values) != len(labels):
            raise UserInputError(f"the series {name} has {len(values)} values", where=y)
    width, titles = 0.8 / len(series), dict[str, str]()

    def draw(axes: Any) -> list[str]:
        remarks = []
        for index, (name, values) in enumerate(series.items()):
            kept = [_drawable(v, log_y) for v in values]
            remarks += _left_out(name, kept, log_y)
            places = [i + (index - (len(series) - 1) / 2) * width for i in range(len(labels))]
            heights = [v if good else 0.0 for v, good in zip(values, kept, strict=True)]
            bars = axes.bar(places, heights, width, color=_colour(index), label=name)
            for number, bar in enumerate(bars):
                bar.set_gid(f"bar-{index}-{number}")
                titles[f"bar-{index}-{number}"] = f"{labels[number]}: {values[number]:.4g}"
        if log_y and any(_drawable(v, True) for values in series.values() for v in values):
            axes.set_yscale("log")
        step = math.ceil(len(labels) / _NAMED_TICKS)
        axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=90, fontsize=7)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        return remarks

    return _drawn(draw, "", y, legend=len(series) > 1, titles=titles)


def histogram(values: ArrayLike, *, x: str) -> Chart:
    """The distribution of values; counts are on a logarithmic axis, so that outliers are visible.

    Args:
        values: Numbers, or an array. A remark counts values that are not finite, hence not drawn.
        x: Label of the x axis.

    Raises:
        UserInputError: there are no values.
        UnsupportedError: matplotlib is not installed.
    """
    import numpy as np

    given = np.asarray(values, np.float64).reshape(-1)
    _check_series({x: given.tolist()})
    finite = given[np.isfinite(given)]

    def draw(axes: Any) -> list[str]:
        counts, edges = np.histogram(finite, _BINS)
        held = counts > 0
        widths = np.diff(edges)[held]
        axes.bar(edges[:-1][held], counts[held], widths, align="edge", color=_colour(0))
        if held.any():
            axes.set_yscale("log")
        lost = given.size - finite.size
        return [f"{lost} values that are not finite are not drawn"] if lost else []

    return _drawn(draw, x, "count")


def _drawn(
    draw: Callable[[Any], list[str]],
    x: str,
    y: str,
    *,
    legend: bool = False,
    titles: Mapping[str, str] | None = None,
) -> Chart:
    """The chart that `draw` draws on axes named x and y; `draw` returns remarks."""
    matplotlib = require("matplotlib", extra="report", purpose="draw charts")
    figures = require("matplotlib.figure", extra="report", purpose="draw charts")
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=_INCHES, layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        remarks = draw(axes)
        if legend:
            axes.legend()
        written = io.StringIO()
        plain = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=plain)
    return Chart(_tidy(written.getvalue(), titles or {}), tuple(remarks))


def _tidy(svg: str, titles: Mapping[str, str]) -> str:
    """The `<svg>` element with the page's colours and with titles for elements that have an id."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the page
    svg = re.sub(r"\s*<defs>\s*</defs>", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page defines its own
    for key, title in titles.items():
        svg = svg.replace(f'<g id="{key}">', f"<g><title>{escape(title)}</title>", 1)
    return svg


def _colour(index: int) -> str:
    return _SERIES[index % len(_SERIES)]


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _left_out(name: str, kept: Sequence[bool], log: bool) -> list[str]:
    lost = len(kept) - sum(kept)
    if not lost:
        return []
    why = "not finite, or not above zero on the logarithmic axis" if log else "not finite"
    return [f"{name}: {lost} of {len(kept)} values are not drawn ({why})"]


def _check_series(series: Mapping[str, Sequence[float]]) -> None:
    empty = next((name for name, values in series.items() if len(values) == 0), None)
    if not series or empty is not None:
        raise UserInputError(
            "a chart has no numbers to show" if empty is None else f"the series {empty} is empty"
        )
