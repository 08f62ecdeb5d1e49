"""Terminal output: progress bars (plain lines if there is no terminal) and tables.

Texts come from files, paths and options, so nothing in them is interpreted: no rich markup or
emoji, and no control character reaches the terminal. All printing goes through this module.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from qalora_compile.progress import listening

WIDE = 160
"""Width in columns if the output is not a terminal and COLUMNS is not set."""

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that move the cursor, control the terminal or reverse the direction of text."""


def shown(text: str) -> str:
    """A text with every control character except line feed and tab escaped."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PlainConsole(Console):
    """A console that prints texts verbatim, with control characters escaped."""

    def __init__(self, *, stderr: bool = False, width: int | None = None, quiet: bool = False):
        super().__init__(
            stderr=stderr, width=width, quiet=quiet, markup=False, emoji=False, highlight=False
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """See `rich.console.Console`; every printed text passes through here."""
        return super().render_str(shown(text), **options)


_width_known = sys.stdout.isatty() or "COLUMNS" in os.environ
console = PlainConsole(width=None if _width_known else WIDE)
"""Tables and results, on standard output."""
err_console = PlainConsole(stderr=True)
"""Progress and errors, on standard error, so that output can be piped."""

_PLAIN_INTERVAL_S = 5.0


class Steps:
    """Progress of one command: a bar for each kind of work, and free text next to it."""

    def __init__(self, console: Console = err_console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._live = console.is_terminal
        self._last_line = 0.0
        self._started: dict[str, float] = {}
        self._before: dict[str, int] = {}

    def update(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` steps of `what` are done; the first call starts the bar."""
        begins = done == 0 or what not in self._started
        if begins:
            self._started[what], self._before[what] = time.monotonic(), done
        if not self._live:
            if not begins or done == total:
                self._print_plainly(what, done, total, note)
            return
        if what not in self._tasks or done == 0:
            if what in self._tasks:
                self._bar.remove_task(self._tasks[what])
            self._tasks[what] = self._bar.add_task(shown(what), total=total, note="")
        self._bar.update(self._tasks[what], completed=done, total=total, note=shown(note))

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text)

    def _print_plainly(self, what: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done < total and now - self._last_line < _PLAIN_INTERVAL_S:
            return
        self._last_line = now
        spent = now - self._started[what]
        left = spent / max(1, done - self._before[what]) * (total - done)
        self._console.print(
            f"{what} {done}/{total} {spent:.0f} s, eta {left:.0f} s {note}".rstrip()
        )


@contextmanager
def steps() -> Iterator[Steps]:
    """Show the progress of everything in the block."""
    shown = Steps()
    with listening(shown.update, shown.say):
        if shown._live:
            with shown._bar:
                yield shown
        else:
            yield shown


@contextmanager
def quiet() -> Iterator[Steps]:
    """Discard all progress, for every process but the first."""
    yield Steps(PlainConsole(quiet=True))


def complain(text: str) -> None:
    """Print an error, or that the command was stopped, on standard error."""
    err_console.print(text, style="bold red", soft_wrap=True)


def print_json(value: object) -> None:
    """Print a value as JSON, with control characters escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    escaped = _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    console.print(escaped, soft_wrap=True)


def print_summary(title: str, rows: Mapping[str, object]) -> None:
    """Print a closing table with two columns."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    wrap: Sequence[str] | None = None,
) -> None:
    """Print a table with a header; columns of numbers are right-aligned.

    Columns named in `wrap` may take several lines; None means the last column only.
    """
    wrap = columns[-1:] if wrap is None else wrap
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(
            column,
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=column not in wrap,
        )
    for row in rows:
        table.add_row(*[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row])
    console.print(table)
