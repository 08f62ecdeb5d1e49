"""SIGINT (Ctrl-C) and SIGTERM: a command cleans up; training writes a checkpoint first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qalora_compile.cli.exit_codes import INTERRUPTED, TERMINATED

_SAME_S = 1.0
"""Signals within this time count as one: launchers repeat what the terminal sent to all."""


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM: the command cleans up as after Ctrl-C."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` in the block on SIGTERM; in the main thread only."""

    def handle(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


class Stop:
    """Whether a signal has requested a training run to stop.

    Attributes:
        number: The number of the first signal; None before it.
        step: The last step that is done.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.step: int | None = None
        self._came = 0.0

    def __call__(self) -> bool:
        """Whether a signal has arrived."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """The exit code of a stopped command, whether this process or another got the signal."""
        return TERMINATED if self.number == signal.SIGTERM else INTERRUPTED

    def handle(self, number: int, frame: Any) -> None:
        """Record the first signal; a second one, over `_SAME_S` later, ends the command at once.

        Raises:
            KeyboardInterrupt: on the second signal.
        """
        now = time.monotonic()
        if self.number is None:
            self.number, self._came = number, now
            after = "" if self.step is None else f" after step {self.step + 1}"
            # A handler may interrupt a print, so it writes past all buffers.
            os.write(2, f"\nsaving{after}; once more to stop at once\n".encode())
        elif now - self._came > _SAME_S:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def stopping(stop: Stop) -> Iterator[Stop]:
    """Record the first signal of the block in `stop`, and let a second one end the command."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(number, stop.handle) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)
