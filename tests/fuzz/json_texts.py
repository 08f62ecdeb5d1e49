"""Texts of JSON with one change, and what is put into them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[Any], Any]

TEXTS = (
    "", "x", "../../secret", "/etc/hostname", "C:\\x", "\0", "\n[/red]\x1b[2J", "é" * 3, "a" * 5000,
    "__import__('os')", "{{ 1/0 }}", "(a+)+$", "re:(.*.*)*x", "NaN", "-1", "true", "null",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 64, 1000, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**7, 10**50, 0.5, 1e-9, -0.5, 1e30, 1e308,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, 0, 1, -1, 1.5, "x", "", [], [1], {}, {"a": 1}, [[[]]])
_RAW = {
    "NaN": "NaN", "Infinity": "Infinity", "-Infinity": "-Infinity", "1e999": "1e999",
    "a number of 5000 digits": "9" * 5000, "half a surrogate": '"\\ud800"',
    "nested": "[" * 100_000 + "]" * 100_000, "no value": "", "a control character": '"\x01"',
}  # fmt: skip
"""Texts that are put where a value was."""
_MARK = "@@mark@@"


def _places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value[:8]))
    found = [way] if way else []
    for key, each in inner:
        found += _places(each, (*way, key))
    return found


def changed_json(draw: Draw, text: str) -> tuple[str, str, bool]:
    """A text of JSON with one change."""
    value = json.loads(text)
    places = _places(value)
    kind = draw(st.sampled_from(("other", "same", "same", "delete", "twice", "raw", "root", "add")))
    if not places or kind == "root":
        other = draw(st.sampled_from(OTHERS))
        return json.dumps(other), f"all of it is {other!r}", isinstance(other, dict)
    way = draw(st.sampled_from(places))
    holder = value
    for key in way[:-1]:
        holder = holder[key]
    key, old = way[-1], holder[way[-1]]
    name = ".".join(map(str, way))
    if kind == "delete":
        del holder[key]
        return json.dumps(value), f"{name} deleted", True
    if kind == "add":
        other = draw(st.sampled_from(OTHERS))
        if isinstance(holder, dict):
            holder[draw(st.sampled_from(TEXTS)) or "new"] = other
        else:
            holder.insert(key, other)
        return json.dumps(value), f"{other!r} added beside {name}", True
    if kind == "twice":
        holder[key] = _MARK
        pair = f"{json.dumps(str(key))}: {json.dumps(old)}"
        if not isinstance(holder, dict):
            holder[key] = old
            holder.insert(key, old)
            return json.dumps(value), f"{name} twice", True
        marked = json.dumps(value).replace(
            f'{json.dumps(str(key))}: "{_MARK}"', f"{json.dumps(str(key))}: 1, {pair}", 1
        )
        return marked, f"the key {name} twice", False
    if kind == "raw":
        what = draw(st.sampled_from(sorted(_RAW)))
        holder[key] = _MARK
        return json.dumps(value).replace(f'"{_MARK}"', _RAW[what], 1), f"{name}: {what}", False
    other, content = _another(draw, old, kind)
    holder[key] = other
    return json.dumps(value), f"{name} is {other!r}", content


def _another(draw: Draw, old: Any, kind: str) -> tuple[Any, bool]:
    """Another value: of the same type, or of any."""
    if kind == "same" and isinstance(old, bool):
        return not old, True
    if kind == "same" and isinstance(old, (int, float)):
        return draw(st.sampled_from(NUMBERS)), True
    if kind == "same" and isinstance(old, str):
        return draw(st.sampled_from(TEXTS)), True
    if kind == "same" and isinstance(old, list):
        return (old * 2 if draw(st.booleans()) else old[::-1]), True
    other = draw(st.sampled_from(OTHERS))
    numbers = all(type(v) in (int, float) for v in (old, other))
    # nothing, in place of something, is as good as leaving it out
    return other, None in (other, old) or numbers or type(other) is type(old)
