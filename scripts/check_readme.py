"""Run the commands and code of the README and of the pages in docs, and the examples.

Fenced blocks after a line `<!-- ci: run -->` run in one temporary folder: first the `python` blocks
of a page, in order, in one Python process; then each `bash` block, with this environment first in
PATH. Then every example that is a program runs in its own process. Python's processes are forked
from this one, which has imported the libraries, but nothing of the package.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from scripts.forks import fork, import_libraries

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
Run = Callable[[dict[str, str], str], int]
"""A run in an environment and a folder; gives the exit status."""


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


def page_runs(page: str) -> list[tuple[str, Run]]:
    """Each run of a page's blocks, with its name."""
    blocks = marked_blocks(page)
    python = "\n".join(code for kind, code in blocks if kind == "python")
    runs: list[tuple[str, Run]] = []
    if python:
        runs.append((f"{page}: python", partial(fork, partial(run_code, python))))
    for kind, code in blocks:
        if kind == "bash":
            runs.append((f"{page}: {code.splitlines()[0]}", partial(run_bash, code)))
    return runs


def run_bash(code: str, environment: dict[str, str], folder: str) -> int:
    """Run a block of bash."""
    command = ["bash", "-euo", "pipefail", "-c", code]
    return subprocess.run(command, check=False, cwd=folder, env=environment).returncode


def run_code(code: str) -> None:
    """Run code as `python -c` does."""
    sys.path.insert(0, "")
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)


def run_example(path: Path) -> None:
    """Run a program as `python FILE` does."""
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path)]
    runpy.run_path(str(path), run_name="__main__")


def main() -> None:
    """Run the blocks, then the examples."""
    import_libraries()
    runs = [run for page in PAGES for run in page_runs(page)]
    runs += [
        (f"examples/{example.name}", partial(fork, partial(run_example, example)))
        for example in sorted((ROOT / "examples").glob("*.py"))
        if example.name not in NOT_HERE
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    with tempfile.TemporaryDirectory() as scratch:
        for name, run in runs:
            print(f"--- {name}", flush=True)
            if status := run(environment, scratch):
                raise SystemExit(f"{name}: failed with {status}")


if __name__ == "__main__":
    main()
