"""Rows of a table that differ in the numbers of their path only, as one row each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"(?<![^.@])\d+(?![^.@])")
"""A whole part of a dotted path: the 3 of `layers.3.fc1`, not the 1."""
_OWN = ("path", "weight", "bytes", "why")
"""Columns in which rows that are alike may differ."""


def group_alike(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for all that are alike, where the first of them stood.

    The numbers of `path` and `weight` become ranges (`layers.{0..11}.q_proj`), `bytes` the sum,
    and `count` says how many rows there were. `why`, which is of each row alone, is left out.
    """
    groups: dict[tuple[object, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        rest = tuple(pattern_of(value) for name, value in row.items() if name not in _OWN)
        groups[(pattern_of(row["path"]), *rest)].append(row)
    return [
        {
            **same[0],
            "path": ranges_of([row["path"] for row in same]),
            "weight": ranges_of([row["weight"] for row in same]),
            "bytes": sum(row["bytes"] for row in same),
            "reason": ranges_of([row["reason"] for row in same]),
            "count": len(same),
        }
        | ({"why": ""} if len(same) > 1 else {})
        for same in groups.values()
    ]


def pattern_of(value: object) -> object:
    """A text with its numbers made alike; other values as they are."""
    return _NUMBER.sub("#", value) if isinstance(value, str) else value


def ranges_of(texts: Sequence[str]) -> str:
    """Texts of one pattern as one, with the numbers that vary in braces."""
    columns = zip(*(map(int, _NUMBER.findall(text)) for text in texts), strict=True)
    shown = iter([_braces(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(shown), texts[0])


def _braces(numbers: Sequence[int]) -> str:
    """`7`, `{0..11}` or `{0..3,8}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{{{','.join(parts)}}}" if len(numbers) > 1 else str(numbers[0])
