"""Plant every fault of `tests/verify`, run the checks on each, and print the scores.

    python -m scripts.mutation_score [--table]

The faults written by hand are given to three checks; those that operators of mutation generate in
the attention, masks, rotary tables, caches, norms, residuals, heads and gates of a transformer, and
rewrites that keep its meaning, by node and by tools, to the proof. Exits with 1 if a check misses a
fault that it should catch, or reports it under a wrong name, or if less than 95 % of the rewrites
are proved.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.verify.model_faults import MODEL_FAULTS
from tests.verify.mutations import mutants, rewrites
from tests.verify.planted import examine, export_all
from tests.verify.program_faults import PROGRAM_FAULTS
from tests.verify.rewrites import SIMPLIFIERS
from tests.verify.score import is_right, score_line, table
from tests.verify.transformer import (
    DECODERS,
    ENCODERS,
    TARGETS,
    export_transformer,
    judged,
    judged_tools,
)

_LEAST = 0.95


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
    caught = sum(map(is_right, found))
    return 0 if _generated(len(found), caught) and caught == len(found) else 1


def _generated(planted: int, caught: int) -> bool:
    """Judge the generated changes of transformers, and print the scores of all.

    Args:
        planted: How many faults were written by hand.
        caught: How many of these were found as expected.
    """
    with tempfile.TemporaryDirectory() as name:
        exported = export_transformer(Path(name))
        faults, same = dict[str, bool](), dict[str, bool]()
        for target in TARGETS:
            faults |= judged(exported, target, mutants)
            same |= judged(exported, target, rewrites)
    for name in [*DECODERS, *ENCODERS]:
        with tempfile.TemporaryDirectory() as folder:
            exported = export_transformer(Path(folder), name)
            for target in TARGETS:
                found = judged_tools(exported, target)
                same |= {f"{name}, {change}": proved for change, proved in found.items()}
    for change in [f for f, proved in faults.items() if proved]:
        print(f"PROVED, BUT A FAULT: {change}")
    for change in [c for c, proved in same.items() if not proved]:
        print(f"NOT PROVED: {change}")
    missed, proved = sum(faults.values()), sum(same.values())
    if not SIMPLIFIERS.exists():
        print("without onnxslim and onnxsim: make simplifiers installs them")
    print(
        f"faults: {planted + len(faults)}, {planted - caught + missed} not caught, {len(faults)} "
        "of them in attention, masks, rotary tables, caches, norms, residuals, heads and gates, "
        f"{missed} of these proved equal; rewrites that keep the meaning: {len(same)}, {proved} "
        f"proved equal ({proved / len(same):.1%})"
    )
    return missed == 0 and proved >= _LEAST * len(same)


if __name__ == "__main__":
    sys.exit(main())
