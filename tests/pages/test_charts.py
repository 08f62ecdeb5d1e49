"""Charts: what is drawn, what is left out and said, and that equal numbers give equal text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
import pytest

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.pages import Chart, charts, histogram, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def lines() -> Chart:
    return line_chart({"train": ([0, 1, 2], [3.0, 2.0, 1.5])}, x="step", y="loss")


def counts() -> Chart:
    return histogram(np.linspace(-1, 1, 500), x="shift")


def texts(chart: Chart) -> list[str]:
    return [element.text or "" for element in ET.fromstring(chart.svg).iter(f"{SVG}text")]


def test_names_are_drawn_as_they_are() -> None:
    names = ["$\\frac{a}$", "</text><script>", "&amp;"]
    series = {name: ([0.0, 1.0], [1.0, 2.0]) for name in names}
    chart = line_chart(series, x="$x$", y="<y>")
    assert {*names, "$x$", "<y>"} <= {*texts(chart)}


@pytest.mark.parametrize("draw", [lines, counts])
def test_equal_numbers_give_equal_text_in_the_colours_of_the_page(
    draw: Callable[[], Chart],
) -> None:
    chart = draw()
    assert chart == draw()
    assert chart.remarks == ()
    assert "var(--series-0)" in chart.svg and "var(--ink)" in chart.svg
    assert re.findall(r"#[0-9a-fA-F]{6}", chart.svg) == []
    assert "<style" not in chart.svg and "font-family" not in chart.svg


def test_axes_are_named_and_one_series_needs_no_legend() -> None:
    assert {"step", "loss"} <= set(texts(lines()))
    assert "train" not in texts(lines())
    both = line_chart({"a": ([0], [1]), "b": ([0], [2])}, x="step", y="loss")
    assert {"a", "b"} <= set(texts(both))


def test_ticks_of_steps_are_integers_and_large_numbers_are_grouped() -> None:
    few = line_chart({"a": ([1, 2, 3], [1.0, 2.0, 3.0])}, x="step", y="loss")
    assert {"1", "2", "3"} <= set(texts(few)) and not {"1.5", "2.5"} & set(texts(few)[:5])
    long = line_chart({"a": ([0, 40_000], [0.0, 1.0])}, x="step", y="loss")
    assert "40,000" in texts(long)


def test_a_share_is_drawn_in_percent_from_0_to_100() -> None:
    chart = line_chart({"a": ([1, 2], [0.4, 0.5])}, x="step", y="right", share=True)
    assert {"0 %", "100 %"} <= set(texts(chart))


def test_a_logarithmic_axis_has_readable_ticks() -> None:
    chart = line_chart({"a": ([1, 2], [0.4, 5.0])}, x="step", y="norm", log_y=True)
    assert {"0.5", "1", "2", "5"} <= set(texts(chart))


def test_what_cannot_be_drawn_is_said() -> None:
    values = [0.0, math.nan, 1.0]
    assert line_chart({"e": ([1, 2, 3], values)}, x="x", y="y", log_y=True).remarks == (
        "e: 2 of 3 values are not drawn (not finite, or not above zero on the logarithmic axis)",
    )
    assert line_chart({"e": ([1, 2, 3], values)}, x="x", y="y").remarks == (
        "e: 1 of 3 values are not drawn (not finite)",
    )
    assert histogram([1.0, math.inf], x="x").remarks == (
        "1 values that are not finite are not drawn",
    )
    nothing = line_chart({"e": ([1], [0.0])}, x="x", y="y", log_y=True)
    assert nothing.remarks[0].startswith("e: 1 of 1")


@pytest.mark.parametrize(
    "draw",
    [
        lambda: line_chart({}, x="x", y="y"),
        lambda: line_chart({"a": ([1], [1, 2])}, x="x", y="y"),
        lambda: line_chart({"a": ([], [])}, x="x", y="y"),
        lambda: histogram([], x="x"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(draw: Callable[[], Chart]) -> None:
    with pytest.raises(UserInputError):
        draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *, extra: str, purpose: str) -> None:
        raise UnsupportedError(f"{name} is needed to {purpose}", hint=extra)

    monkeypatch.setattr(charts, "require", missing)
    with pytest.raises(UnsupportedError, match="draw charts") as caught:
        lines()
    assert caught.value.hint == "report"
