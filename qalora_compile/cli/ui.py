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

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
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
_LEAST_TEXT = 12
"""Columns that a name needs to be folded over several lines and still be read."""


class _RateColumn(ProgressColumn):
    """Steps per second, or seconds per step if that is more than one."""

    def render(self, task: Task) -> Text:
        """See `rich.progress.ProgressColumn`."""
        return Text(rate(task.finished_speed or task.speed), style="progress.data.speed")


def rate(speed: float | None) -> str:
    """A speed in steps per second as text: `3.2/s`, or `4.1 s each` if it is below 1."""
    if not speed:
        return "?/s"
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


class Steps:
    """Progress of one command: a bar for each kind of work, and free text next to it."""

    def __init__(self, console: Console = err_console) -> None:
        self._console = console
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # only the note is ever cut
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=max(6, min(30, console.width // 10))),
            MofNCompleteColumn(),
            _RateColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False, table_column=rest),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._live = console.is_terminal
        self._last_line = 0.0
        self._started: dict[str, float] = {}
        self._before: dict[str, int] = {}
        self._totals: dict[str, int] = {}

    def update(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Show that `done` of `total` steps of `what` are done; the first call starts the bar.

        With None as the total, it is the one of the last call.
        """
        total = self._totals[what] = self._totals.get(what, done) if total is None else total
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
        self._console.print(text, soft_wrap=True)

    def _print_plainly(self, what: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done < total and now - self._last_line < _PLAIN_INTERVAL_S:
            return
        self._last_line = now
        spent = now - self._started[what]
        new = max(1, done - self._before[what])
        speed = rate(new / spent if spent else None)
        left = spent / new * (total - done)
        line = f"{what} {done}/{total} {spent:.0f} s, {speed}, eta {left:.0f} s {note}"
        self._console.print(line.rstrip(), soft_wrap=True)


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


def remark(text: str) -> None:
    """Print a line on standard error that belongs to an error."""
    err_console.print(text, soft_wrap=True)


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

    Columns named in `wrap` may take several lines; None means the first and the last one. Where the
    terminal is too narrow for the others, each row is printed as a table of two columns.
    """
    wrap = (columns[0], columns[-1]) if wrap is None else wrap
    texts = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    if _least_width(columns, texts, wrap) > console.width:
        _print_records(title, columns, texts)
        return
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(
            column,
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=column not in wrap,
        )
    for text in texts:
        table.add_row(*text)
    console.print(table)


def _least_width(
    columns: Sequence[str], texts: Sequence[Sequence[str]], wrap: Sequence[str]
) -> int:
    """The width of a table in which nothing is cut."""
    total = 1
    for index, column in enumerate(columns):
        lines = [line for row in texts for line in row[index].splitlines()]
        widest = max(cell_len(text) for text in (column, *lines))
        total += 3 + (min(widest, _LEAST_TEXT) if column in wrap else widest)
    return total


def _print_records(title: str, columns: Sequence[str], texts: Sequence[Sequence[str]]) -> None:
    """Print a table of two columns for each row; cells without text are left out."""
    for number, row in enumerate(texts, 1):
        cells = {name: text for name, text in zip(columns, row, strict=True) if text}
        print_summary(f"{title} ({number} of {len(texts)})", cells)
