"""Reads each mutated input in a child process, and says what became of it.

The parent has imported everything and is forked, so that a case costs a few milliseconds. One may
take 20 seconds, and a child one GiB more memory than the parent has.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from qalora_compile.errors import InternalError, QaloraError
from tests.fuzz.mutate import Mutation, mutate
from tests.fuzz.seeds import FORMATS, Format, import_all

SECONDS, MORE_MEMORY, BATCH = 20, 1 << 30, 25
TYPED, SAME, PAYLOAD, DIFFERENT = "typed", "same", "payload differs", "different"
LIBRARY, HANG, CRASH = "library", "hang", "crash"
OUTCOMES = (TYPED, SAME, PAYLOAD, DIFFERENT, LIBRARY, HANG, CRASH)
BAD = (DIFFERENT, LIBRARY, HANG, CRASH)


@dataclass(frozen=True)
class Case:
    """One mutated input and what became of it."""

    format: str
    mutation: Mutation
    outcome: str
    text: str


@dataclass
class Table:
    """How many mutations of each format had which outcome."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Of all formats."""
        return sum(sum(row.values()) for row in self.counts.values())

    @property
    def bad(self) -> int:
        """How many should not have been."""
        return sum(row[outcome] for row in self.counts.values() for outcome in BAD)

    def lines(self) -> list[str]:
        """As Markdown."""
        lines = [f"| format | mutations | {' | '.join(OUTCOMES)} |", "|---" * 9 + "|"]
        for name, row in self.counts.items():
            cells = " | ".join(str(row[outcome]) for outcome in OUTCOMES)
            lines.append(f"| {name} | {sum(row.values())} | {cells} |")
        sums = (sum(row[outcome] for row in self.counts.values()) for outcome in OUTCOMES)
        lines.append(f"| all | {self.total} | {' | '.join(map(str, sums))} |")
        return lines


def fuzz(names: list[str], count: int, number: int, keep: Path, progress: bool = False) -> Table:
    """Try so many mutations, spread over formats.

    Args:
        names: Of the formats.
        count: Of all mutations.
        number: Seed of the run.
        keep: A folder for what should not have been.
        progress: Print a line for each format.
    """
    table, began = Table(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        valid = import_all(names, Path(scratch) / "valid")
        for index, name in enumerate(names):
            share = count // len(names) + (index < count % len(names))
            row = table.counts[name] = Counter[str]()
            started = time.monotonic()
            for case, folder in _cases(FORMATS[name], share, number, Path(scratch), valid[name]):
                row[case.outcome] += 1
                if case.outcome in BAD:
                    _keep(case, folder, keep, row[case.outcome])
            if progress:
                bad = {outcome: row[outcome] for outcome in BAD if row[outcome]}
                print(
                    f"{name}: {share} in {time.monotonic() - started:.0f} s {bad or ''}", flush=True
                )
    table.seconds = time.monotonic() - began
    return table


def _cases(
    made: Format, count: int, number: int, scratch: Path, wanted: str
) -> list[tuple[Case, Path]]:
    """The cases of one format, as hypothesis draws them; folders of bad ones stay until then."""
    valid, found = scratch / "valid" / made.name.replace(" ", "-"), list[tuple[Case, Path]]()
    child = Child(made)

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        folder = scratch / f"case-{len(found)}"
        shutil.rmtree(folder, ignore_errors=True)  # hypothesis gives up some draws halfway
        shutil.copytree(valid, folder)
        mutation = mutate(data.draw, folder, made.files)
        outcome, text = child.read(folder)
        if outcome == "read":
            outcome = check_bound(made, mutation, text == wanted)
        found.append((Case(made.name, mutation, outcome, text), folder))
        if outcome not in BAD:
            shutil.rmtree(folder)

    try:
        one()
    finally:
        child.close()
    return found


def check_bound(made: Format, mutation: Mutation, same: bool) -> str:
    """What it means that an input was read."""
    if same:
        return SAME
    return PAYLOAD if mutation.content and not made.own else DIFFERENT


class Child:
    """A child that reads inputs one after another, and is replaced when it dies or has read many.

    Forking costs more than reading: a child for each input would take three times as long. What an
    input leaves behind in it can only make another one look worse, and such are read again alone.
    """

    def __init__(self, made: Format) -> None:
        self.made, self.left, self.pid = made, 0, 0
        self._answers = self._requests = -1

    def read(self, folder: Path) -> tuple[str, str]:
        """Read an input: `read` with its digest, or another outcome with its error."""
        fresh = self.left == 0
        outcome, text = self._ask(folder)
        if outcome in (LIBRARY, HANG, CRASH) and not fresh:
            self.close()
            outcome, text = self._ask(folder)
        return outcome, text

    def close(self) -> None:
        """End the child."""
        if self.pid:
            os.close(self._requests)
            os.close(self._answers)
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.pid = self.left = 0

    def _ask(self, folder: Path) -> tuple[str, str]:
        if self.left == 0:
            self.close()
            self._fork()
        self.left -= 1
        os.write(self._requests, f"{folder}\n".encode())
        answer, limit = b"", time.monotonic() + SECONDS
        while not answer.endswith(b"\0") and (left := limit - time.monotonic()) > 0:
            if not select.select([self._answers], [], [], left)[0]:
                break
            part = os.read(self._answers, 1 << 16)
            if not part:
                return CRASH, self._status()
            answer += part
        if not answer.endswith(b"\0"):
            self.close()
            return HANG, f"over {SECONDS} seconds"
        outcome, _, text = answer[:-1].decode("utf-8", "replace").partition("\n")
        return outcome, text

    def _status(self) -> str:
        _, status = os.waitpid(self.pid, 0)
        os.close(self._requests)
        os.close(self._answers)
        self.pid = self.left = 0
        return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "it ended"

    def _fork(self) -> None:
        requests, answers = os.pipe(), os.pipe()
        self.pid, self.left = os.fork(), BATCH
        if self.pid == 0:
            os.close(requests[1])
            os.close(answers[0])
            _serve(self.made, requests[0], answers[1])
        os.close(requests[0])
        os.close(answers[1])
        self._requests, self._answers = requests[1], answers[0]


def _serve(made: Format, requests: int, answers: int) -> None:
    """In the child: read what is asked for, until it is ended."""
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        faulthandler.disable()
        memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (memory + MORE_MEMORY, memory + MORE_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(requests) as lines:
            for line in lines:
                said = _read(made, Path(line.rstrip("\n")))
                os.write(
                    answers, said.encode("utf-8", "replace")[:60_000].replace(b"\0", b"") + b"\0"
                )
    finally:
        os._exit(0)


def _read(made: Format, folder: Path) -> str:
    """The outcome and its text."""
    try:
        return f"read\n{made.door(folder)}"
    except InternalError:
        return f"{LIBRARY}\n{traceback.format_exc()}"
    except QaloraError as error:
        return f"{TYPED}\n{error}"
    except BaseException:
        return f"{LIBRARY}\n{traceback.format_exc()}"


def _keep(case: Case, folder: Path, keep: Path, number: int) -> None:
    """Keep a bad input, to be read again with `--replay`."""
    target = keep / f"{case.format.replace(' ', '-')}-{case.outcome}-{number}"
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, target)
    (target / "case.json").write_text(json.dumps(asdict(case), indent=1), "utf-8")


def replay(folder: Path) -> int:
    """Read a kept input once more, in this process, for a debugger; its error is shown."""
    case: Mapping[str, str] = json.loads((folder / "case.json").read_text("utf-8"))
    print(f"{case['format']}, {case['mutation']}: was {case['outcome']}")
    try:
        print(f"read: {FORMATS[case['format']].door(folder)}")
    except QaloraError as error:
        print(f"typed: {error}")
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0
