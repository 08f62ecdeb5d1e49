"""Commands and code in forked children: nothing is imported again, and signals come from outside.

A fork is safe while torch computes with one thread. A test in which the start of the interpreter or
the launcher matters starts a process of its own instead.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import runpy
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from qalora_compile.cli.main import main

TIMEOUT_S = 60
FOREIGN = 99
"""The exit code of an exception that a command lets through."""
_MOST = 1 << 20
"""Bytes that a child can say before it has to wait for `wait`."""


class Forked:
    """Some work in a child, as if its own process had been started."""

    def __init__(self, work: Callable[[], int]) -> None:
        """Start it.

        Args:
            work: Gives the exit code.
        """
        pipes = [os.pipe(), os.pipe()]  # no files: a child may run under a limit of their size
        self._said = [reading for reading, _ in pipes]
        for _, writing in pipes:
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _MOST)
        self._pid = os.fork()
        if self._pid == 0:
            for number, (_, writing) in enumerate(pipes, start=1):
                os.dup2(writing, number)
            os._exit(_run(work))
        for _, writing in pipes:
            os.close(writing)

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def send(self, number: int) -> None:
        """Send it a signal; until `wait`, its id is its own."""
        os.kill(self._pid, number)

    def wait(self) -> tuple[int, str, str]:
        """Its exit code, less than 0 for a signal, its output and its errors; to be called once."""
        texts = []
        for said in self._said:
            with open(said, "rb") as stream:
                texts.append(stream.read().decode("utf-8", "replace"))
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]), texts[0], texts[1]


def command(line: Sequence[str], before: Callable[[], None] = lambda: None) -> Forked:
    """Start a command of `main`; `before` is called in the child."""

    def work() -> int:
        before()
        return main(list(line))

    return Forked(work)


def code(text: str, words: Sequence[str] = (), folder: Path | None = None) -> Forked:
    """Start `python -c TEXT WORDS …`, in a folder."""

    def work() -> int:
        sys.path.insert(0, "")
        own = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(text, "<string>", "exec"), own.__dict__)
        return 0

    return _python(work, ["-c", *words], folder)


def script(path: Path, words: Sequence[str] = (), folder: Path | None = None) -> Forked:
    """Start `python PATH WORDS …`, in a folder."""

    def work() -> int:
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")
        return 0

    return _python(work, [str(path), *words], folder)


def module(name: str, words: Sequence[str] = ()) -> Forked:
    """Start `python -m NAME WORDS …`."""

    def work() -> int:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return 0

    return _python(work, [name, *words], None)


def _python(work: Callable[[], int], words: Sequence[str], folder: Path | None) -> Forked:
    """Start work that reads `sys.argv` and may end by `SystemExit`."""

    def run() -> int:
        if folder is not None:
            os.chdir(folder)
        sys.argv = list(words)
        warnings.simplefilter("default")  # pytest makes errors of them
        try:
            return work()
        except SystemExit as end:
            if not isinstance(end.code, int | None):
                print(end.code, file=sys.stderr)
                return 1
            return end.code or 0
        except BaseException:
            traceback.print_exc()
            return 1

    return Forked(run)


def _run(work: Callable[[], int]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    signal.alarm(TIMEOUT_S)  # no child outlives this
    faulthandler.dump_traceback_later(TIMEOUT_S - 1, file=2)
    # A child that is killed would keep the lock that tqdm shares between processes, for good.
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    streams = [open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2)]  # noqa: SIM115
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            ended = work()
        except BaseException as error:
            print(f"foreign: {type(error).__name__}: {error}", file=sys.stderr)
            ended = FOREIGN
        for stream in streams:
            stream.flush()
    return ended
