"""Replay docs/start/first_ten_minutes.md: the commands of a first session, at 80 columns.

A `console` block of the page has commands after `$ ` and what they print on standard output. They
run in one scratch folder, after `examples/fetch.py`. Compared are the words: numbers, blanks and
lines of tables may differ from run to run, and no line may be longer than 80 columns.

    python -m scripts.transcript            replay and compare
    python -m scripts.transcript --write    replay and write what is printed now
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.forks import fork, import_libraries

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "start" / "first_ten_minutes.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COLUMNS = 80
_NUMBER = re.compile(r"[-+]?\d[\d.,e+-]*")
_LINES = re.compile(r"[─-╿]+")
_LAYER = re.compile(r"\bmodel\.layers\.\S+")
"""The layers that are worst differ from processor to processor."""


def commands(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a block, each with what it printed."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        end = next(i for i, line in enumerate(lines) if not line.endswith("\\\n")) + 1
        yield "".join(lines[:end]).rstrip("\n"), "".join(lines[end:])


def words(text: str) -> list[str]:
    """What has to be the same in each run."""
    return _NUMBER.sub("#", _LAYER.sub("LAYER", _LINES.sub(" ", text))).split()


def replay(command: str, folder: Path) -> str:
    """Standard output of a command of the package, which is run in a child.

    Raises:
        SystemExit: it fails, or prints a line that is too long.
    """
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    if program != "qalora-compile":
        raise SystemExit(f"{command}: only commands of qalora-compile are replayed")
    printed = folder / "printed"

    def work() -> None:
        with printed.open("wb") as file:
            os.dup2(file.fileno(), 1)
        from qalora_compile.cli.main import main

        raise SystemExit(main(arguments))

    print(f"--- {command}", flush=True)
    status = fork(work, {"COLUMNS": str(COLUMNS)}, str(folder))
    if status:
        raise SystemExit(f"{command}: failed with {status}")
    lines = [line.rstrip() for line in printed.read_text("utf-8").splitlines()]
    long = [line for line in lines if len(line) > COLUMNS]
    if long:
        raise SystemExit(f"{command}: longer than {COLUMNS} columns:\n{long[0]}")
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    """Replay all blocks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    page = PAGE.read_text("utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fetch: list[str | Path] = [sys.executable, ROOT / "examples" / "fetch.py"]
        subprocess.run(fetch, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        import_libraries()
        for block in BLOCK.findall(page):
            new = ""
            for command, before in commands(block):
                now = replay(command, folder)
                new += f"$ {command}\n{now}"
                if not write and words(before) != words(now):
                    changed = difflib.unified_diff(words(before), words(now), "page", "now", n=2)
                    raise SystemExit(f"{command} prints something else:\n" + "\n".join(changed))
            page = page.replace(block, new)
    if write:
        PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
