"""Write the tables of docs/reference/checkpoints.md: what each format preserves.

python -m scripts.write_checkpoints
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import torch

from qalora_compile.files import write_text
from tests.exporters.matrix import PAGE, STUDIES, put_into, tables


def main() -> None:
    """Write every format, read it back, and put the tables into the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row for study in STUDIES for row in study(Path(scratch))]
    text = put_into(PAGE.read_text("utf-8"), tables(rows))
    write_text(PAGE, text)
    print(f"wrote {PAGE.name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
