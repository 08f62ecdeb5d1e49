"""`python -m tests.fuzz`: mutate inputs of every format, and see what becomes of each.

    make fuzz                                  20,000 mutations, and the table of their page
    make fuzz ARGS="--count 2000 --seed 7"     fewer, others
    make fuzz ARGS="--format GGUF ONNX"        these formats alone
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
from pathlib import Path

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
        say = f"{table.total} mutations, seed {options.seed}, {table.seconds:.0f} s, {today}:"
        write_table([say, "", *table.lines()])
    return 1 if table.bad else 0


def write_table(lines: list[str]) -> None:
    """Put lines between the marks of docs/reference/security.md."""
    text = DOCS.read_text("utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCS.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
