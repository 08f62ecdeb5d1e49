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
TRIES = int(os.environ.get("QALORA_TRIES", "3"))
"""Kills, and limits, of each command; `make test-ended` takes 50."""
COMMANDS = ("finetune", "fold", "export", "quantize")
TARGETS = ("onnx", "gguf", "mlx", "float", "safetensors", "hqq")
LIMITED = (*COMMANDS, *(f"export {target}" for target in TARGETS))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The rows that `tests.e2e.ended` prints, of one process that ends all the commands."""
    ends = [*(f"kills {name}" for name in COMMANDS), *(f"limits {name}" for name in LIMITED)]
    words = [str(tmp_path_factory.mktemp("ended")), str(TRIES), "18", *ends]
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.e2e.ended", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300 + 400 * TRIES,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = found.stdout.splitlines()
    said = [json.loads(line.removeprefix("row: ")) for line in lines if line.startswith("row: ")]
    return dict(zip(ends, said, strict=True))


@pytest.mark.parametrize("name", LIMITED)
def test_a_disk_that_fills_up_at_any_byte_loses_nothing(rows: dict[str, Any], name: str) -> None:
    row = rows[f"limits {name}"]
    assert (row["command"], row["limits"], row["wrong"]) == (name, TRIES, [])


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_killed_at_any_moment_ends_in_the_same_bytes(
    rows: dict[str, Any], name: str
) -> None:
    row = rows[f"kills {name}"]
    assert (row["command"], row["landed"], row["wrong"]) == (name, TRIES, [])
