"""`python -m tests.fuzz`: mutate inputs of every format, and see what becomes of each.

    make fuzz                                  20,000 mutations, and the table of their page
    make fuzz ARGS="--count 2000 --seed 7"     fewer, others
    make fuzz ARGS="--format GGUF ONNX"        these formats alone, and their rows
    python -m tests.fuzz --replay fuzz-failures/GGUF-hang-1

Exits with 1 if an input was read as another one, or ended in an exception of a library, a crash or
a hang; such inputs are kept.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.run import Table

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "security.md"
BEGIN, END = "<!-- fuzz: begin -->", "<!-- fuzz: end -->"


def main() -> int:
    """Run."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    from tests.fuzz.run import fuzz, replay
    from tests.fuzz.seeds import FORMATS

    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="of mutations (20,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", nargs="+", choices=tuple(FORMATS), default=list(FORMATS))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), metavar="FOLDER")
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/reference/security.md"
    )
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="read a kept input again")
    options = parser.parse_args()
    if options.replay:
        return replay(options.replay)
    table = fuzz(options.format, options.count, options.seed, options.keep, progress=True)
    print(*table.lines(), sep="\n")
    print(f"{table.total} mutations in {table.seconds:.0f} s, {table.bad} of them not as wanted")
    if table.bad:
        print(f"kept in {options.keep}/: python -m tests.fuzz --replay FOLDER")
    if options.write:
        today = datetime.datetime.now(tz=datetime.timezone.utc).date()
        say = f"{table.total} mutations, seed {options.seed}, {table.seconds:.0f} s, {today}"
        text = DOCS.read_text("utf-8")
        DOCS.write_text(with_table(text, table, say, list(FORMATS)), "utf-8")
    return 1 if table.bad else 0


def with_table(text: str, table: Table, say: str, formats: Sequence[str]) -> str:
    """The page with the rows of a run between its marks.

    A run of some formats leaves the rows of the others, and its line `say` follows theirs.

    Args:
        text: The page.
        table: The run.
        say: What was run, when, and how long it took.
        formats: All formats, in their order.
    """
    from tests.fuzz.run import OUTCOMES, Table

    before, rest = text.split(BEGIN)
    held, after = rest.split(END)
    said, counts = [f"{say}."], dict(table.counts)
    if set(counts) != set(formats):
        of = f"{', '.join(counts)}: "
        earlier = [line for line in held.splitlines() if line and not line.startswith(("|", of))]
        said = [*earlier, f"{of}{say}."]
        for line in held.splitlines():
            name, _, *cells = [cell.strip() for cell in line.split("|")[1:-1]] or ["", ""]
            if name in formats and name not in counts:
                counts[name] = Counter(dict(zip(OUTCOMES, map(int, cells), strict=True)))
    rows = Table({name: counts[name] for name in formats if name in counts})
    lines = [*(part for line in said for part in (line, "")), *rows.lines()]
    return "\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"])


if __name__ == "__main__":
    sys.exit(main())
