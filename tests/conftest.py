"""Shared set-up: seeded tests, every pass checked against its stage, golden files."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from qalora_compile.testing import Golden

pytest_plugins = ["pytester"]

settings.register_profile(
    "local", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _checked(qalora_validating: None) -> None:
    """Seed torch; programs are validated around every pass of the test."""
    torch.manual_seed(0)


@pytest.fixture
def golden(qalora_golden: Golden) -> Golden:
    """The users' fixture, by a short name: `(name, text)` against `golden/<name>.txt`."""
    return qalora_golden
