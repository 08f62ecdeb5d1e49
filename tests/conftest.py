"""Shared set-up: seeded tests, every pass checked against its stage, golden files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from qalora_compile.passes.base import validating

GOLDEN = Path(__file__).parent / "golden"

settings.register_profile(
    "local", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden`."""
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden texts instead of comparing"
    )


@pytest.fixture(autouse=True)
def _checked() -> Iterator[None]:
    """Seed torch, and validate programs around every pass of the test."""
    torch.manual_seed(0)
    with validating():
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """A function `(name, text)` that compares text with `golden/<name>.txt`."""
    update = bool(request.config.getoption("--update-golden"))

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if update:
            path.write_text(text, "utf-8")
        assert path.exists(), f"{path} is missing: run pytest with --update-golden"
        assert text == path.read_text("utf-8")

    return compare
