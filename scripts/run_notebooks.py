"""Run the notebooks of the documentation, and keep what they print.

    python -m scripts.run_notebooks                  small sizes; fails where a cell does
    python -m scripts.run_notebooks --full --write   full sizes; puts the outputs into the files
    python -m scripts.run_notebooks passes           one of them

It needs nbclient and ipykernel, which `make docs` installs into an environment of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "notebooks"
SECONDS = 600
"""How long one cell may take."""


def run(path: Path, *, write: bool) -> float:
    """Run one notebook; gives the seconds that it took.

    Raises:
        SystemExit: a cell fails.
    """
    begin = time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": FOLDER}})
    try:
        client.execute()
    except CellExecutionError as error:
        raise SystemExit(f"{path.name}: {error}") from error
    if write:
        for cell in notebook.cells:
            cell.get("metadata", {}).pop("execution", None)
            if "outputs" in cell:  # stderr has warnings with the paths of this machine
                cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        nbformat.write(notebook, path)
    return time.monotonic() - begin


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all notebooks, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks; default: all of them")
    parser.add_argument("--full", action="store_true", help="full sizes: minutes, not seconds")
    parser.add_argument("--write", action="store_true", help="put the outputs into the files")
    options = parser.parse_args(arguments)
    if not options.full:
        os.environ["QALORA_QUICK"] = "1"
    paths = [FOLDER / f"{name}.ipynb" for name in options.names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        print(f"{path.name}: {run(path, write=options.write):.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
