"""The base of all specifications: conversion to JSON, and errors that name the field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from qalora_compile.errors import UserInputError

AUTO = "auto"
"""A value of `bits`, `group_size` and `rank`: chosen for each layer within a budget."""

S = TypeVar("S", bound="Spec")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of the specifications."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v
            for f in dataclasses.fields(self)
        }

    @classmethod
    def from_json(cls: type[S], value: Mapping[str, Any]) -> S:
        """Build a specification from JSON types.

        Raises:
            UserInputError: a key is unknown, or a value is out of range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for key in value:
            if key not in names:
                raise UserInputError(
                    f"{cls.__name__} has no field {key!r}", hint=f"fields: {', '.join(names)}"
                )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def one_of(field: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse a value that is not one of those allowed.

    Raises:
        UserInputError: the value is another, or of another type.
    """
    # 4.0 is not 4, True not 1
    if not any(value == known and type(value) is type(known) for known in allowed):
        raise UserInputError(
            f"{field} is {value!r}", hint=f"use one of {', '.join(map(str, allowed))}"
        )


LARGEST_SEED = 2**63 - 1
"""The largest seed of torch's generators, a signed integer of 64 bits."""


def check_int(field: str, value: object, *, least: int, most: int | None = None) -> None:
    """Refuse a value that is not an integer from `least` to `most`.

    Raises:
        UserInputError: it is not; the field is named.
    """
    highest = math.inf if most is None else most
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= highest:
        limit = "or more" if most is None else f"to {most}"
        raise UserInputError(f"{field} is {value!r}", hint=f"use an integer, {least} {limit}")


def is_positive(value: object) -> bool:
    """Whether a value is a finite number above 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 < value < float("inf")
