"""Charts: what is drawn, what is left out and said, and that equal numbers give equal text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
import pytest

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.pages import Chart, bar_chart, charts, histogram, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def bars() -> Chart:
    return bar_chart(["q", "k<1>"], {"A": [1.0, 2.0], "B": [3.0, 4.0]}, y="error")


def lines() -> Chart:
    return line_chart({"train": ([0, 1, 2], [3.0, 2.0, 1.5])}, x="step", y="loss")


def counts() -> Chart:
    return histogram(np.linspace(-1, 1, 500), x="shift")


def texts(chart: Chart) -> list[str]:
    return [element.text or "" for element in ET.fromstring(chart.svg).iter(f"{SVG}text")]


def test_names_are_drawn_as_they_are() -> None:
    names = ["$\\frac{a}$", "</text><script>", "&amp;"]
    chart = bar_chart(names, {"$x$": [1.0, 2.0, 3.0]}, y="error")
    assert {*names} <= {*texts(chart)}


@pytest.mark.parametrize("draw", [bars, lines, counts])
def test_equal_numbers_give_equal_text_in_the_colours_of_the_page(
    draw: Callable[[], Chart],
) -> None:
    chart = draw()
    assert chart == draw()
    assert chart.remarks == ()
    assert "var(--series-0)" in chart.svg and "var(--ink)" in chart.svg
    assert re.findall(r"#[0-9a-fA-F]{6}", chart.svg) == []
    assert "<style" not in chart.svg and "font-family" not in chart.svg


def test_axes_legend_and_bars_are_named() -> None:
    found = texts(bars())
    assert {"error", "q", "k<1>", "A", "B"} <= set(found)
    titles = [element.text for element in ET.fromstring(bars().svg).iter(f"{SVG}title")]
    assert titles == ["q: 1", "k<1>: 2", "q: 3", "k<1>: 4"]
    assert {"step", "loss"} <= set(texts(lines()))
    assert "train" not in texts(lines()), "one series needs no legend"


def test_a_longer_bar_is_a_larger_value() -> None:
    drawn = ET.fromstring(bar_chart(["a", "b"], {"v": [1.0, 2.0]}, y="y").svg)
    heights = []
    for group in drawn.iter(f"{SVG}g"):
        if group.find(f"{SVG}title") is not None:
            path = group.find(f"{SVG}path")
            assert path is not None
            ys = [float(pair.split()[2]) for pair in path.attrib["d"].splitlines() if " " in pair]
            heights.append(max(ys) - min(ys))
    assert heights[1] == pytest.approx(2 * heights[0], rel=1e-3)


def test_of_many_bars_some_are_named_below_and_all_on_pointing() -> None:
    chart = bar_chart([f"layer{i}" for i in range(210)], {"e": [1.0] * 210}, y="e")
    assert sum(text.startswith("layer") for text in texts(chart)) == 35
    assert chart.svg.count("<title>") == 210


def test_what_cannot_be_drawn_is_said() -> None:
    values = [0.0, math.nan, 1.0]
    assert bar_chart(["a", "b", "c"], {"e": values}, y="e", log_y=True).remarks == (
        "e: 2 of 3 values are not drawn (not finite, or not above zero on the logarithmic axis)",
    )
    assert line_chart({"e": ([1, 2, 3], values)}, x="x", y="y").remarks == (
        "e: 1 of 3 values are not drawn (not finite)",
    )
    assert histogram([1.0, math.inf], x="x").remarks == (
        "1 values that are not finite are not drawn",
    )
    nothing = bar_chart(["a"], {"e": [0.0]}, y="e", log_y=True)
    assert nothing.remarks[0].startswith("e: 1 of 1")


@pytest.mark.parametrize(
    "draw",
    [
        lambda: line_chart({}, x="x", y="y"),
        lambda: line_chart({"a": ([1], [1, 2])}, x="x", y="y"),
        lambda: line_chart({"a": ([], [])}, x="x", y="y"),
        lambda: bar_chart(["a"], {"e": [1, 2]}, y="y"),
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
