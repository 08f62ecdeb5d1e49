"""Shared set-up: seeded tests, models traced once, programs checked around passes, golden files."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, settings

from qalora_compile.testing import Golden
from tests.captures import Memo, remember_translations

pytest_plugins = ["pytester"]

ALWAYS_CHECKED = ("ir", "passes")

settings.register_profile(
    "local", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--one-of-each`."""
    parser.addoption(
        "--one-of-each",
        metavar="SALT",
        help="run each test with one of its parameters; another salt takes other ones",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the parameters that `--one-of-each` does not take."""
    salt = config.getoption("--one-of-each")
    if salt is None:
        return
    chosen: dict[str, pytest.Item] = {}
    for item in sorted(items, key=lambda item: crc32(f"{salt} {item.nodeid}".encode())):
        chosen.setdefault(item.nodeid.partition("[")[0], item)
    kept = {item.nodeid for item in chosen.values()}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> None:
    """Seed torch before a file is imported: what it draws must not depend on the other files."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Let Python's collector pass over all that was imported: a tenth of the time went there."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def captures() -> Iterator[Memo]:
    """Models of one structure are traced once in the run."""
    memo = Memo(torch.export.export)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", memo)
        remember_translations(patch)
        yield memo


@pytest.fixture(autouse=True)
def _checked(request: pytest.FixtureRequest) -> None:
    """Seed torch; in tests of passes and programs, and in one of eight others, check all programs.

    They are validated around every pass that runs.
    """
    room = request.path.relative_to(Path(__file__).parent).parts[0]
    if room in ALWAYS_CHECKED or crc32(request.node.nodeid.encode()) % 8 == 0:
        request.getfixturevalue("qalora_validating")
    torch.manual_seed(0)


@pytest.fixture
def golden(qalora_golden: Golden) -> Golden:
    """The users' fixture, by a short name: `(name, text)` against `golden/<name>.txt`."""
    return qalora_golden
