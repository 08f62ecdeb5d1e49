"""Commands that are killed, and disks that fill up: nothing is lost, the next run ends right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TRIES = int(os.environ.get("QALORA_TRIES", "5"))
"""Kills, and limits, of each command; `make test-ended` takes 50."""
TARGETS = ("onnx", "gguf", "mlx", "float", "safetensors", "hqq")


def ended(what: str, root: Path, count: int, *names: str, timeout: int = 1200) -> list[Any]:
    """The rows that `tests.e2e.ended` prints."""
    words = ["-W", "ignore", "-m", "tests.e2e.ended", what, str(root), str(count), "18", *names]
    found = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = found.stdout.splitlines()
    return [json.loads(line.removeprefix("row: ")) for line in lines if line.startswith("row: ")]


@pytest.mark.slow
def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    rows = ended("limits", tmp_path, 6, "fold", "export safetensors", "quantize")
    assert [(row["limits"], row["wrong"]) for row in rows] == [(6, [])] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "fold", "export", "quantize"])
def test_a_disk_that_fills_up_at_any_byte_loses_nothing(tmp_path: Path, name: str) -> None:
    (row,) = ended("limits", tmp_path, TRIES, name)
    assert (row["limits"], row["wrong"]) == (TRIES, [])


@pytest.mark.slow
def test_a_disk_that_fills_up_is_said_by_every_format(tmp_path: Path) -> None:
    rows = ended("limits", tmp_path, TRIES, *(f"export {target}" for target in TARGETS))
    assert [(row["limits"], row["wrong"]) for row in rows] == [(TRIES, [])] * len(TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "fold", "export", "quantize"])
def test_what_is_killed_at_any_moment_ends_in_the_same_bytes(tmp_path: Path, name: str) -> None:
    (row,) = ended("kills", tmp_path, TRIES, name)
    assert row["wrong"] == []
    assert row["landed"] == TRIES
