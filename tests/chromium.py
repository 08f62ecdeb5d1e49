"""A browser for tests: Chromium, driven by the playwright of the clients' environment."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / "build" / "clients" / "bin" / "python"
"""Python clients: an environment of its own, as optimum-onnx wants an older transformers."""


def python_with_clients() -> Path:
    """The interpreter with the Python clients; skips the test if there is none."""
    if not PYTHON.is_file():
        pytest.skip("the Python clients are not installed: make clients")
    return PYTHON


def browser() -> str:
    """The path of Chromium; skips the test if there is none."""
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("there is no chromium on this machine")
    return found
