"""Progress of long-running work, announced by the core and shown by a listener.

Passes and exporters must not know about terminals, so they only announce steps. The command line
(or a notebook) installs a listener for the duration of its call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int], None]
"""Called with (what, steps done, total steps)."""
Reader = Callable[[str], None]
"""Called with a line of text."""

_listener: ContextVar[Listener | None] = ContextVar("qalora_progress", default=None)
_reader: ContextVar[Reader | None] = ContextVar("qalora_notes", default=None)


@contextmanager
def listening(listener: Listener, reader: Reader | None = None) -> Iterator[None]:
    """Send the progress of everything run inside the block to `listener`, remarks to `reader`."""
    tokens = _listener.set(listener), _reader.set(reader)
    try:
        yield
    finally:
        _listener.reset(tokens[0])
        _reader.reset(tokens[1])


def say(text: str) -> None:
    """Say in one line what begins now, or what the user should know of it."""
    reader = _reader.get()
    if reader is not None:
        reader(text)


def announce(what: str, done: int, total: int) -> None:
    """Say that `done` of `total` steps of `what` are finished."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Iterate over `items` and announce each finished one under the heading `what`."""
    total = len(items)
    announce(what, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        announce(what, done, total)
