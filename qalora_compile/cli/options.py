"""Convert parsed options to specifications."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    S = TypeVar("S", bound=DataclassInstance)


def command_line(*words: object) -> str:
    """A command of this package, quoted for the shell."""
    return shlex.join(["qalora-compile", *map(str, words)])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that suggests the nearest known name; empty if none is near."""
    bare = {each.lstrip("-"): each for each in known}  # two dashes alone are no likeness
    near = difflib.get_close_matches(name.lstrip("-"), bare, n=1)
    return f"did you mean {bare[near[0]]}?" if near else ""


def spec_of(made: type[S], options: argparse.Namespace, /, **more: Any) -> S:
    """A specification whose fields are set from the options of the same names; lists become tuples.

    Args:
        made: A dataclass.
        options: The parsed options; those that name no field are ignored.
        more: Fields that are not an option, or have another name or type there.

    Raises:
        UserInputError: a value is out of range, or options conflict.
    """
    names = {field.name for field in dataclasses.fields(made)}
    values = {name: value for name, value in vars(options).items() if name in names} | more
    return made(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
