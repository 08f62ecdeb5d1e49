"""docs/reference/supported.md is about this zoo: its models, its checks."""

from __future__ import annotations

from scripts.write_architectures import COLUMNS as COLUMNS_OF_ARCHITECTURES
from scripts.write_architectures import ON_THE_ROAD
from scripts.write_supported import COLUMNS, PAGE, PATTERNS, REASONS, number
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.checks import CHECKS
from tests.zoo.entries import ENTRIES


def cells_of(heading: str) -> list[list[str]]:
    """The table under a heading, its rule left out."""
    section = PAGE.read_text("utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


def test_every_model_has_a_row_and_every_check_a_column() -> None:
    header, *rows = cells_of("Models")
    assert header == list(COLUMNS), "run `make supported`"
    assert [row[0] for row in rows] == list(ENTRIES), "run `make supported`"
    first = header.index(next(iter(CHECKS)))
    for row in rows:
        assert all(row[first : first + len(CHECKS)]), f"{row[0]}: a check shows nothing"
        fixed = ENTRIES[row[0]].fixed or {}
        assert all(axis in row[-1] and why in row[-1] for axis, why in fixed.items())


def test_every_reason_and_pattern_has_examples() -> None:
    for heading in (REASONS, PATTERNS):
        _, *rows = cells_of(heading)
        assert rows
        assert all(all(row) for row in rows)


def test_every_architecture_has_a_row() -> None:
    header, *rows = cells_of("Architectures on the command line")
    assert header == list(COLUMNS_OF_ARCHITECTURES), "run `make architectures`"
    names = [row[0].partition(" ")[0].strip("`") for row in rows]
    assert names == list(ARCHITECTURES), "run `make architectures`"
    for name, row in zip(names, rows, strict=True):
        refused = "**refused**" in row[1:-1]
        if name in ON_THE_ROAD:
            assert refused == bool(row[-1]), f"{name}: refused without a word"


def test_nine_of_ten_pass_end_to_end() -> None:
    _, *rows = cells_of("Architectures on the command line")
    tried = [row[1:-1] for row in rows if row[2]]
    assert sum(set(marks) == {"✓"} for marks in tried) >= 0.9 * len(tried) > 90


def test_numbers_have_one_digit() -> None:
    assert [number(x) for x in (None, 0.0, 3.4e-7, 0.012)] == ["✓", "0", "3e-7", "1e-2"]
