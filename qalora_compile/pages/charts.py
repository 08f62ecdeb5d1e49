"""Charts as SVG text: lines and histograms.

The same numbers give the same text. Colours are variables of the page's style, so that charts
follow its dark mode.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.pages.numbers import number_text

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_INK, _FAINT = "#010101", "#020202"
_SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(_SERIES)
}
"""Placeholder colours of a drawing → the page's variables that replace them."""
_INCHES = (4.6, 2.7)
"""Small, so that its text can be read where the page is 400 pixels wide; wide pages have several
next to each other."""
_FEW = 12
"""Up to here, the points of a line are marked."""
_DASHES = ("-", "--", "-.", ":")
_TICKS = 6
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
    "legend.fontsize": 9,
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
    share: bool = False,
) -> Chart:
    """Lines through points. An axis whose values are all integers has ticks at integers only.

    Args:
        series: Name → x values and y values. A value that is not finite leaves a gap, and so does
            one that is not positive on a logarithmic axis; remarks count them.
        x: Label of the x axis.
        y: Label of the y axis.
        log_y: Whether y is logarithmic.
        share: Whether y is a fraction, which is drawn from 0 % to 100 %.

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
            marker = "o" if sum(kept) < _FEW else ""
            style = _DASHES[index % len(_DASHES)]  # lines differ on paper without colours too
            axes.plot(list(xs), shown, color=_colour(index), label=name, marker=marker, ls=style)
        if log_y:
            axes.set_yscale("log")
        if all(float(v).is_integer() for xs, _ in series.values() for v in xs):
            axes.xaxis.get_major_locator().set_params(integer=True)
        return remarks

    return _drawn(draw, x, y, legend=len(series) > 1, share=share)


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
    draw: Callable[[Any], list[str]], x: str, y: str, *, legend: bool = False, share: bool = False
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
        _name_ticks(axes, share=share)
        if legend:
            axes.legend()
        written = io.StringIO()
        plain = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=plain)
    return Chart(_tidy(written.getvalue()), tuple(remarks))


def _name_ticks(axes: Any, *, share: bool) -> None:
    """Write the numbers of both axes as the tables of a page do."""
    tickers = require("matplotlib.ticker", extra="report", purpose="draw charts")
    axes.xaxis.set_major_formatter(tickers.FuncFormatter(lambda v, _: _tick(v)))
    if share:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(tickers.PercentFormatter(1.0, symbol=" %"))
        return
    axes.yaxis.set_major_formatter(tickers.FuncFormatter(lambda v, _: _tick(v)))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(tickers.LogLocator(subs=(1.0, 2.0, 5.0), numticks=_TICKS))
        axes.yaxis.set_minor_locator(tickers.NullLocator())


def _tick(value: float) -> str:
    return number_text(int(value) if float(value).is_integer() else float(f"{value:.6g}"))


def _tidy(svg: str) -> str:
    """The `<svg>` element with the page's colours."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the page
    svg = re.sub(r"\s*<defs>\s*</defs>", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page defines its own


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
