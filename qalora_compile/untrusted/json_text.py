"""JSON of unknown origin, read within limits and with unique keys."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted.paths import read_bytes

MAX_JSON_BYTES = 1 << 28
"""A model's JSON files have a few megabytes; a program of many thousand layers has 256 MiB."""
MAX_JSON_DEPTH = 200
_MAX_DIGITS = 100
"""`model_max_length` of many tokenizers is 10³⁰; Python itself stops at 4,300 digits."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


def read_json(path: Path, *, finite: bool = False) -> Any:
    """Read a JSON file of unknown origin.

    Raises:
        UserInputError: the file is missing, not a regular file, or over 256 MiB; it is not valid
            JSON, repeats a key in one object, is nested more than 200 deep, or holds an integer of
            more than 100 digits or half of a surrogate pair.
    """
    return parse_json(read_bytes(path, limit=MAX_JSON_BYTES), path, finite=finite)


def read_object(path: Path, *, finite: bool = False) -> dict[str, Any]:
    """Read a JSON file whose outermost value is an object; see `read_json`."""
    value = read_json(path, finite=finite)
    if not isinstance(value, dict):
        raise UserInputError(f"{path.name} holds no JSON object", where=str(path))
    return value


def parse_json(data: bytes | str, path: Path | str, *, what: str = "", finite: bool = False) -> Any:
    """Parse JSON; the limits are those of `read_json`.

    Args:
        data: The text, or its UTF-8 bytes.
        path: The file that holds it, with a line number if there is one, for messages.
        what: The name of the text if it is not the entire file.
        finite: Refuse NaN, infinities and numbers beyond float64, which Python reads although they
            are not JSON.

    Raises:
        UserInputError: see `read_json`.
    """
    name = what or Path(path).name
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        _check_depth(text)
        value = (_FINITE if finite else _ANY).decode(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserInputError(
            f"{name} holds half of a surrogate pair, which is not text", where=str(path)
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{name} is not valid JSON: {error}", where=str(path)) from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with unique keys: readers disagree on which of two equal keys counts."""
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits")
    return int(digits)


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the parser recurses into it."""
    if text.count("[") + text.count("{") <= MAX_JSON_DEPTH:
        return
    depth = 0
    for found in _BRACKETS.finditer(text):
        mark = found.group()
        if mark in "[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")
        elif mark in "]}":
            depth -= 1


_ANY = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
_FINITE = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_constant=_finite, parse_float=_finite
)
"""Created once, since data have millions of lines."""
