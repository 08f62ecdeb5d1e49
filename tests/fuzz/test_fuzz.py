"""The fuzzer finds what it is there for; and a short run of it over every format is clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qalora_compile.errors import UserInputError
from tests.fuzz import run
from tests.fuzz.__main__ import BEGIN, END, with_table
from tests.fuzz.mutate import Mutation
from tests.fuzz.run import CRASH, DIFFERENT, HANG, LIBRARY, PAYLOAD, SAME, TYPED, Table, check_bound
from tests.fuzz.seeds import Format


def format_of(door: Callable[[Path], str], *, own: bool = False) -> Format:
    return Format("x", lambda _: None, door, ("*",), own)


def refuse(_: Path) -> str:
    raise UserInputError("no")


def fail(_: Path) -> str:
    raise KeyError("x")


def crash(_: Path) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return ""


def hang(_: Path) -> str:
    time.sleep(60)
    return ""


def swallow(_: Path) -> str:
    return str(len(bytearray(run.MORE_MEMORY * 2)))


@pytest.mark.parametrize(
    ("door", "outcome"),
    [
        (refuse, TYPED),
        (fail, LIBRARY),
        (crash, CRASH),
        (hang, HANG),
        (swallow, LIBRARY),
        (lambda _: "a", "read"),
    ],
)
def test_each_way_to_end_is_told_from_the_others(
    door: Callable[[Path], str], outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SECONDS", 1)
    child = run.Child(format_of(door))
    assert [child.read(tmp_path)[0] for _ in range(2)] == [outcome] * 2
    child.close()


@pytest.mark.parametrize(
    ("same", "content", "own", "outcome"),
    [
        (True, False, False, SAME),
        (False, True, False, PAYLOAD),
        (False, False, False, DIFFERENT),
        (False, True, True, DIFFERENT),
    ],
)
def test_another_result_is_accepted_of_content_without_checksums_alone(
    same: bool, content: bool, own: bool, outcome: str
) -> None:
    made = format_of(lambda _: "a", own=own)
    assert check_bound(made, Mutation("k", "f", "d", content), same) == outcome


def test_the_table_sums_up() -> None:
    table = Table()
    table.counts["JSONL"] = Counter({TYPED: 3, DIFFERENT: 1})
    assert (table.total, table.bad) == (4, 1)
    assert table.lines()[-1] == "| all | 4 | 3 | 0 | 0 | 1 | 0 | 0 | 0 |"


@pytest.mark.slow
def test_a_short_run_over_every_format_is_clean(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.fuzz", "--count", "1200", "--keep", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_a_run_of_some_formats_leaves_the_rows_of_others() -> None:
    formats = ("A", "B", "C")
    first = Table({"A": Counter({TYPED: 2}), "B": Counter({TYPED: 3, SAME: 1})})
    page = with_table(f"x\n{BEGIN}\n{END}\ny", first, "6 mutations", formats[:2])
    assert "6 mutations." in page
    for count in (1, 5):
        page = with_table(page, Table({"C": Counter({PAYLOAD: count})}), f"{count} more", formats)
    lines = page.splitlines()
    assert [line for line in lines if "mutations." in line or "more" in line] == [
        "6 mutations.",
        "C: 5 more.",
    ]
    assert "| B | 4 | 3 | 1 | 0 | 0 | 0 | 0 | 0 |" in lines
    assert "| all | 11 | 5 | 1 | 5 | 0 | 0 | 0 | 0 |" in lines
    assert (lines[0], lines[-1]) == ("x", "y")
