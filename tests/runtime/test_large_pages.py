"""Weights of a layer that runs often move into large pages, and the layer computes the same."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.runtime.layer import Layer, open_model

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OLDEST = (6, 1)
"""The first Linux with MADV_COLLAPSE."""
RUNS = 48
"""Runs of few rows after which every layer has had its turn."""


def large_pages() -> int:
    """Bytes of this process in large pages."""
    lines = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    found = next(line for line in lines if line.startswith("AnonHugePages:"))
    return 1024 * int(found.split()[1])


def movable() -> bool:
    """Whether this system moves memory into large pages when it is asked to, and not by itself."""
    release = tuple(int(part) for part in platform.release().split(".")[:2] if part.isdigit())
    return SETTING.is_file() and "[madvise]" in SETTING.read_text("ascii") and release >= OLDEST


@pytest.mark.skipif(not movable(), reason="no large pages on request")
@pytest.mark.parametrize(("rows", "moved"), [(1, True), (16, False)])
def test_weights_move_after_runs_of_few_rows(rows: int, moved: bool) -> None:
    layer = Layer(k=4096, n=2048, m=rows)  # 4 MiB of codes
    arrays = layer.arrays()
    session = open_model(layer.model())
    before = large_pages()
    first = session.run(None, {"x": arrays["x"]})[0]
    assert large_pages() - before < 2 << 20
    for _ in range(RUNS):
        assert session.run(None, {"x": arrays["x"]})[0].tobytes() == first.tobytes()
    assert (large_pages() - before >= 2 << 20) == moved
