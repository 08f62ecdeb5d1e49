"""Shared set-up: seeded tests, models traced once, programs checked around passes, golden files."""

from __future__ import annotations

import gc
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, settings

from qalora_compile.exporters.onnx import model, write
from qalora_compile.testing import Golden
from tests.captures import Memo
from tests.shortcuts import shortcuts
from tests.translations import Translations

pytest_plugins = ["pytester"]

ALWAYS_CHECKED = ("ir", "passes")
BY_TIME = (
    *("attacks", "e2e", "zoo", "cli", "exporters", "passes", "capture", "verify"),
    *("training", "testing", "ir", "cases", "benchmarks", "ground", "files"),
)
"""Folders in the order in which processes take them with `--by`.

Those that take long come first, so that no process waits for another in the end; but attacks, which
fork, while processes are small.
"""

settings.register_profile(
    "local", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--one-of-each`, `--some-of-each` and `--by`."""
    for amount, number in (("one", "one"), ("some", "about the square root of the number")):
        parser.addoption(
            f"--{amount}-of-each",
            metavar="SALT",
            help=f"run each test with {number} of its parameters; another salt takes other ones",
        )
    parser.addoption(
        "--by",
        choices=("folder", "file"),
        help="with xdist: run all tests of a folder, or of a file, in one process, which keeps "
        "what they share",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute the tests as `--by` says."""
    by = config.getoption("--by")
    if by is None:
        return None
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist gives no types
        def _split_scope(self, nodeid: str) -> str:
            return _folder(nodeid) if by == "folder" else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def _folder(nodeid: str) -> str:
    """The folder in `tests` that a test is in; of those in none, its file."""
    return nodeid.partition("::")[0].removeprefix("tests/").partition("/")[0]


def _turn(item: pytest.Item) -> int:
    folder = _folder(item.nodeid)
    return BY_TIME.index(folder) if folder in BY_TIME else len(BY_TIME)


@pytest.hookimpl(trylast=True)  # after `-m` and `-k` have left items out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests by folder, and leave out what `--one-of-each` or `--some-of-each` does."""
    if config.getoption("--by"):
        items.sort(key=_turn)
    one, some = (config.getoption(f"--{amount}-of-each") for amount in ("one", "some"))
    if one is None and some is None:
        return
    tests = defaultdict[str, list[pytest.Item]](list)
    for item in sorted(items, key=lambda item: crc32(f"{one or some} {item.nodeid}".encode())):
        tests[item.nodeid.partition("[")[0]].append(item)
    kept = {
        item.nodeid
        for each in tests.values()
        for item in each[: 1 if some is None else math.ceil(math.sqrt(len(each)))]
    }
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
    with shortcuts(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", memo)
        yield memo


@pytest.fixture(scope="session", autouse=True)
def sync() -> Iterator[Callable[[int], None]]:
    """Nothing that a test writes has to outlive the machine: none waits for the disk.

    The fixture is the real `os.fsync`, for tests of durable files.
    """
    real = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield real


@pytest.fixture(scope="session", autouse=True)
def translations() -> Iterator[Translations]:
    """Programs of one graph are translated to ONNX once in the run."""
    remembered = Translations(model.translate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "translate", remembered)
        yield remembered


@pytest.fixture(scope="module")
def translated_anew(translations: Translations) -> Iterator[None]:
    """In a file about translating, every program is translated."""
    with translations.off():
        yield


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
