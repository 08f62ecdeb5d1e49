"""The table of docs/reference/checkpoints.md says what is so."""

from __future__ import annotations

import pytest

from tests.exporters.matrix import (
    KEPT,
    NO_CODES,
    PAGE,
    READ,
    SEEN,
    STUDIES,
    WRITE,
    Row,
    put_into,
    tables,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Every study, run once."""
    folder = tmp_path_factory.mktemp("matrix")
    return [row for study in STUDIES for row in study(folder)]


@pytest.mark.slow
def test_the_page_is_what_the_formats_declare_and_decoders_find(rows: list[Row]) -> None:
    page = PAGE.read_text("utf-8")
    assert put_into(page, tables(rows)) == page, "run: python -m scripts.write_checkpoints"


@pytest.mark.slow
def test_what_is_declared_is_what_is_measured(rows: list[Row]) -> None:
    for row in (row for row in rows if row.direction == WRITE):
        exact = row.cells["scale"].startswith("exact")
        seen = float(row.cells[SEEN.format(4, 32)])
        assert seen <= (0 if exact else 1e-3), row.name
        assert exact or seen > 1e-6, f"{row.name} rounds, and nothing changed"


@pytest.mark.slow
def test_all_codes_that_are_read_are_kept(rows: list[Row]) -> None:
    read = [row for row in rows if row.direction == READ]
    assert {row.name for row in read} >= {"gptq", "compressed-tensors", "safetensors", "float"}
    for row in read:
        if row.cells[KEPT] != NO_CODES:
            kept, _, total = row.cells[KEPT].partition(" of ")
            assert kept == total != "0", row.name
        assert float(row.cells["largest change of a weight"]) <= 1e-6, row.name


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no marks"):
        put_into("a page", "a table")
