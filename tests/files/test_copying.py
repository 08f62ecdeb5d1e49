"""Copies of parts of files."""

from __future__ import annotations

import io

import pytest

from qalora_compile.files import copying
from qalora_compile.files.copying import copy_range


@pytest.mark.parametrize("piece", [1, 3, 100])
def test_a_part_is_copied_and_a_short_file_is_counted(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", piece)
    source, target = io.BytesIO(b"0123456789"), io.BytesIO()
    assert copy_range(source, target, 2, 5) == 5
    assert copy_range(source, target, 8, 5) == 2
    assert copy_range(source, target, 50, 1) == 0
    assert target.getvalue() == b"2345689"
