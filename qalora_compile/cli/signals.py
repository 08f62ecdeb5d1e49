"""SIGINT (Ctrl-C) and SIGTERM: both end a command in order, a training with a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qalora_compile.cli.exit_codes import INTERRUPTED, TERMINATED

_SAME_S = 1.0
"""A launcher passes a signal on that the terminal has sent to all processes already."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what the command was doing is cleaned up as after Ctrl-C."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` in the block when SIGTERM comes; in the main thread alone."""

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
    """Whether a signal has asked a training to stop.

    Attributes:
        number: Of the first signal; None before it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._came = 0.0

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """What a command ends with that was stopped, by this process's signal or by another's."""
        return TERMINATED if self.number == signal.SIGTERM else INTERRUPTED

    def handle(self, number: int, frame: Any) -> None:
        """Note the first signal; one that comes later than at once ends the command.

        Raises:
            KeyboardInterrupt: it was asked for twice.
        """
        now = time.monotonic()
        if self.number is None:
            self.number, self._came = number, now
        elif now - self._came > _SAME_S:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def stopping(stop: Stop) -> Iterator[Stop]:
    """Let the first signal of the block be asked for, and a second one end the command."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(number, stop.handle) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)
