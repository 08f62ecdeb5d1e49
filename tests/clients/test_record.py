"""The table of clients: it has a row for every test that records one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.write_clients import PAGE, merged, read_rows, recording_tests, with_rows
from tests.clients.record import FOLDER, ClientRow, record_client

ROW = ClientRow(
    client="a client",
    version="1.0",
    target="ort",
    model="a model",
    result="tokens equal",
    speed="",
    test="tests/clients/test_record.py::test_a_row_is_written_if_a_folder_is_given",
)


def test_the_table_has_a_row_for_each_test_that_records() -> None:
    """After a new test of a client: `make clients-table`."""
    rows = read_rows(PAGE.read_text("utf-8"))
    assert {row.test for row in rows} == set(recording_tests())
    assert all(row.version and row.result for row in rows)


def test_rows_are_read_as_they_are_written() -> None:
    page = PAGE.read_text("utf-8")
    rows = read_rows(page)
    assert with_rows(page, rows) == page
    assert read_rows(with_rows(page, [ROW])) == [ROW]


def test_a_row_is_written_if_a_folder_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    record_client("a client", "1.0", "ort", "a model", "tokens equal")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(FOLDER, str(tmp_path))
    record_client("a client", "1.0", "ort", "a model", "tokens equal")
    (made,) = tmp_path.iterdir()
    assert ClientRow(**json.loads(made.read_text("utf-8"))) == ROW


def test_rows_of_tests_that_did_not_run_are_kept_and_others_dropped() -> None:
    old = read_rows(PAGE.read_text("utf-8"))
    newer = replace(old[0], version="99")
    gone = replace(ROW, test="tests/clients/test_clients.py::test_that_is_gone")
    rows = merged([*old, gone], [newer])
    assert newer in rows
    assert gone not in rows
    assert {row.test for row in rows} == {row.test for row in old}
