"""Choices made weight by weight, as options of passes: `ranks=["layers.0=4","layers.1=12"]`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from qalora_compile.errors import UserInputError
from qalora_compile.ir.plan import SitePlan


def format_choices(choices: Mapping[str, str | int]) -> tuple[str, ...]:
    """Choices by path as texts `path=value`."""
    return tuple(f"{path}={value}" for path, value in choices.items())


def parse_choices(texts: tuple[str, ...], option: str) -> Mapping[str, str]:
    """Undo `format_choices`; the values stay text.

    Raises:
        UserInputError: a text has no path or no value, or a path occurs twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        path, _, value = str(text).rpartition("=")
        if not path or not value or path in found:
            raise UserInputError(
                f"{option} holds {text!r}", hint="write path=value, once for each path"
            )
        found[path] = value
    return found


def parse_ranks(texts: tuple[str, ...]) -> Mapping[str, int]:
    """Ranks by path.

    Raises:
        UserInputError: a text is none of the form `path=rank`, the rank 1 or more.
    """
    choices = parse_choices(texts, "ranks")
    for path, value in choices.items():
        if not value.isdecimal() or int(value) < 1:
            raise UserInputError(
                f"ranks gives {path} the rank {value!r}", hint="use a whole number, 1 or more"
            )
    return {path: int(value) for path, value in choices.items()}


def check_paths(choices: Mapping[str, object], plan: SitePlan, option: str) -> None:
    """Every path is of a weight that the plan quantizes.

    Raises:
        UserInputError: one is not; near ones are named.
    """
    known = {site.path for site in plan.to_quantize()}
    for path in choices:
        if path not in known:
            near = difflib.get_close_matches(path, sorted(known), n=3) or sorted(known)[:3]
            raise UserInputError(
                f"{option} names {path!r}, which is no weight that is quantized",
                hint=f"near ones: {', '.join(near)}",
            )
