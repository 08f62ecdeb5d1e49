"""Plant every fault of `tests/verify`, run both checks on each, and print the score.

    python -m scripts.mutation_score [--table]

Exits with 1 if a check misses a fault that it should catch, or reports it under a wrong name.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.verify.model_faults import MODEL_FAULTS
from tests.verify.planted import examine, export_all
from tests.verify.program_faults import PROGRAM_FAULTS
from tests.verify.score import is_right, score_line, table


def main() -> int:
    """Run."""
    with tempfile.TemporaryDirectory() as name:
        models = Path(name)
        export_all(models)
        found = [examine(fault, models, models) for fault in [*PROGRAM_FAULTS, *MODEL_FAULTS]]
    if "--table" in sys.argv[1:]:
        print(table(found))
    for one in found:
        if not is_right(one):
            print(f"NOT AS EXPECTED: {one}")
    print(score_line(found))
    return 0 if all(map(is_right, found)) else 1


if __name__ == "__main__":
    sys.exit(main())
