"""JSON objects are held against dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from qalora_compile.untrusted import (
    check_fields,
)


@dataclass(frozen=True)
class Row:
    """What a record may hold."""

    name: str
    size: int | None
    shape: tuple[int | str, ...] = ()
    flag: bool = False


def test_fields_are_compared_with_a_dataclass() -> None:
    given = {"name": "a", "size": None, "shape": [1, "batch"]}
    assert Row(**check_fields(Row, given, "a row")) == Row("a", None, (1, "batch"))


@pytest.mark.parametrize(
    "changes",
    [
        *({"name": 1}, {"size": True}, {"size": 1.5}, {"shape": "ab"}, {"shape": [None]}),
        *({"flag": 1}, {"other": 1}, {"flag": None}),
    ],
)
def test_fields_of_other_types_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a row"):
        check_fields(Row, {"name": "a", "size": 1} | changes, "a row")


@pytest.mark.parametrize("row", [None, [], {"name": "a"}])
def test_what_is_no_such_object_is_refused(row: object) -> None:
    with pytest.raises(ValueError, match="other fields"):
        check_fields(Row, row, "a row")
