"""The zoo: every architecture end to end, from capture to ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.zoo.checks import run_checks
from tests.zoo.entries import ENTRIES

QUICK = ("cross-attention", "batched-experts", "odd-readings")
"""Those of the default suite: one of each kind of site."""


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ENTRIES],
)
def test_zoo(name: str, tmp_path: Path) -> None:
    run_checks(ENTRIES[name], tmp_path)


def test_the_quick_ones_are_of_the_zoo() -> None:
    assert set(QUICK) < set(ENTRIES)
