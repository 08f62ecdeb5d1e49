"""Run the commands and code of the README and of the pages in docs, and the examples.

Fenced blocks after a line `<!-- ci: run -->` run in one temporary folder: first the `python` blocks
of a page, in order, in one Python process; then each `bash` block, with this environment first in
PATH. Then every example that is a program runs in its own process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = "<!-- ci: run -->"
BLOCK = re.compile(rf"^{MARK}\s*^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = (
    *(
        "README.md",
        "docs/start/guide.md",
        "docs/how-to/verify.md",
        "docs/how-to/testing.md",
        "docs/reference/extending.md",
    ),
    *("docs/how-to/image_model.md", "docs/how-to/peft_adapter.md"),
    *("docs/how-to/training_loop.md", "docs/how-to/own_pass.md"),
)
NOT_HERE = {"demo.py", "assets.py"}
"""Examples that CI runs in a separate step, or that are not programs."""


def marked_blocks(page: str) -> list[tuple[str, str]]:
    """Language and code of the marked blocks of a page.

    Raises:
        SystemExit: nothing is marked, or no block of bash or python follows a mark.
    """
    text = (ROOT / page).read_text("utf-8")
    blocks = BLOCK.findall(text)
    marks = len(re.findall(rf"^{MARK}", text, re.MULTILINE))
    if not blocks or len(blocks) != marks:
        raise SystemExit(f"{page} has {marks} marks to run and {len(blocks)} blocks behind them")
    return blocks


def page_runs(page: str) -> list[tuple[str, list[str]]]:
    """Name and command of each run of a page's blocks."""
    blocks = marked_blocks(page)
    python = "\n".join(code for kind, code in blocks if kind == "python")
    runs: list[tuple[str, list[str]]] = []
    if python:
        runs.append((f"{page}: python", [sys.executable, "-c", python]))
    for kind, code in blocks:
        if kind == "bash":
            command = ["bash", "-euo", "pipefail", "-c", code]
            runs.append((f"{page}: {code.splitlines()[0]}", command))
    return runs


def main() -> None:
    """Run the blocks, then the examples."""
    runs = [run for page in PAGES for run in page_runs(page)]
    runs += [
        (f"examples/{example.name}", [sys.executable, str(example)])
        for example in sorted((ROOT / "examples").glob("*.py"))
        if example.name not in NOT_HERE
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    with tempfile.TemporaryDirectory() as scratch:
        for name, command in runs:
            print(f"--- {name}", flush=True)
            done = subprocess.run(command, check=False, cwd=scratch, env=environment)
            if done.returncode:
                raise SystemExit(f"{name}: failed with {done.returncode}")


if __name__ == "__main__":
    main()
