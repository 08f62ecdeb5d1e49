"""The pytest plugin `qalora`: fixtures, `--update-golden`, and failures that name the place.

pytest loads it automatically where this package is installed. It imports nothing heavy but pytest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qalora_compile.testing.golden import Golden

_FOLDER = "qalora_golden_dir"
_SECTION = "qalora: what the check found"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden`, and the setting `qalora_golden_dir`."""
    parser.getgroup("qalora").addoption(
        "--update-golden", action="store_true", help="write the golden texts instead of comparing"
    )
    parser.addini(
        _FOLDER, "folder of golden texts, from the root; by default `golden` in the test's folder"
    )


@pytest.fixture
def qalora_golden(request: pytest.FixtureRequest) -> Golden:
    """Compares a text or a program with `golden/<name>.txt`: `qalora_golden(name, program)`.

    The folder is `golden` in the folder of the test, or pytest's setting `qalora_golden_dir`.
    `pytest --update-golden` writes the files.
    """
    from qalora_compile.testing.golden import Golden

    folder = str(request.config.getini(_FOLDER))
    place = request.config.rootpath / folder if folder else request.path.parent / "golden"
    return Golden(Path(place), update=bool(request.config.getoption("--update-golden")))


@pytest.fixture
def qalora_validating() -> Iterator[None]:
    """Validates the program before and after every pass of the test."""
    from qalora_compile.passes.framework.base import validating

    with validating():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the complete outcome of a failed check to the report of the test."""
    report = yield
    if call.excinfo is not None:
        outcome = getattr(call.excinfo.value, "outcome", None)
        ours = type(call.excinfo.value).__module__.startswith("qalora_compile.testing.")
        if ours and outcome is not None:
            report.sections.append((_SECTION, _text(outcome)))
    return report


def _text(outcome: object) -> str:
    from qalora_compile.verify.proof.match_structure import Structure

    if isinstance(outcome, Structure):
        open_parts = [s for s in outcome.segments if s.status != "proved"]
        return "\n".join(f"{s.status}: {s.name}" for s in open_parts)
    return str(outcome)
