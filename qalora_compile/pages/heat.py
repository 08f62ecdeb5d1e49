"""Numbers of layers as colours and bars, which begin at zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.pages.layer_names import Grid, grids
from qalora_compile.pages.numbers import number_text, short_text

_COLUMNS = 12
"""The largest number of kinds of layers next to each other."""


def heat_blocks(
    values: Mapping[str, float], top: float | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Blocks of a page, one for each stack of layers, and the paths of the layers in none.

    Args:
        values: Path of a layer → its number.
        top: The number with the full colour; None takes the largest in a stack.

    Raises:
        UserInputError: there are no values, or one is below zero.
    """
    _top(values, top)
    paths = list(values)
    found, rest = grids(paths, columns=_COLUMNS)
    others = [paths[place] for place in rest]
    inside = {path: value for path, value in values.items() if path not in set(others)}
    if not inside:
        return [], others
    top = _top(inside, top)
    return [_block(grid, paths, values, top) for grid in found], others


def bar_rows(values: Mapping[str, float], top: float | None = None) -> list[tuple[str, str, float]]:
    """Name, number and length, in percent of the longest bar, of each bar.

    Raises:
        UserInputError: see `heat_blocks`.
    """
    top = _top(values, top)
    return [(name, number_text(v), _share(v, top)) for name, v in values.items()]


def _top(values: Mapping[str, float], top: float | None) -> float:
    """The number that has the full colour or the longest bar.

    Raises:
        UserInputError: see `heat_blocks`.
    """
    if not values:
        raise UserInputError("a map of layers has no numbers to show")
    below = next((name for name, value in values.items() if value < 0), None)
    if below is not None:
        raise UserInputError(f"{below} has {values[below]}, and colours begin at zero")
    largest = max((v for v in values.values() if math.isfinite(v)), default=0.0)
    return top or largest or 1.0


def _share(value: float, top: float) -> float:
    """The part of `top` in percent; what is beyond it, or no number, has all of it."""
    return round(100 * min(value / top, 1.0), 1) if math.isfinite(value) else 100.0


def _block(
    grid: Grid, paths: Sequence[str], values: Mapping[str, float], top: float
) -> dict[str, Any]:
    parts = [kind.rpartition(".") for kind in grid.kinds]
    rows = []
    for number, places in grid.rows:
        names = [None if place is None else paths[place] for place in places]
        rows.append((number, [_heat_cell(name, values, top) for name in names]))
    return {
        "kind": "heat",
        "stack": grid.stack,
        "groups": [(group, len(list(same))) for group, same in groupby(p[0] for p in parts)],
        "labels": [label or "layer" for _, _, label in parts],
        "rows": rows,
        "top": number_text(top),
        "caption": "",
    }


def _heat_cell(name: str | None, values: Mapping[str, float], top: float) -> tuple[str, float, str]:
    if name is None:
        return "", 0.0, ""
    value = values[name]
    return short_text(value), _share(value, top), f"{name}: {number_text(value)}"
