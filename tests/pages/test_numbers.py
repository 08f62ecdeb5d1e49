"""Numbers as pages write them."""

from __future__ import annotations

import math

import pytest

from qalora_compile.pages.numbers import number_text, percent, short_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (350405, "350,405"),
        (0, "0"),
        (0.0, "0"),
        (0.35, "0.35"),
        (1.23456, "1.235"),
        (-12.0, "-12"),
        (350405.2, "350,405"),
        (0.000123456, "0.0001235"),
        (3.2e-6, "3.2·10⁻⁶"),
        (-2e17, "-2·10¹⁷"),
        (math.nan, "not a number"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_a_number_is_grouped_and_short(value: float, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.123, "0.12"), (1.26, "1.3"), (123.4, "123"), (4e-6, "4·10⁻⁶"), (1e5, "1·10⁵")],
)
def test_a_cell_of_a_map_has_room_for_its_number(value: float, text: str) -> None:
    assert short_text(value) == text and len(text) <= 6


def test_a_share_is_a_percentage() -> None:
    assert percent(0.925) == "92.5 %"
