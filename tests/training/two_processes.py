"""Trains as one of the processes that torchrun started; each writes what it saw, as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import qalora_compile as qc
from qalora_compile.training import FitState, StepReport, find_processes, fit
from tests.training.test_distributed import (
    EXAMPLES,
    HELD_OUT,
    PAIR_SPEC,
    PAIRS,
    RANK_SPEC,
    SPEC,
    sums,
)


def main(folder: Path) -> None:
    """Train with gradients of all processes; then stop where one alone wants to."""
    processes = find_processes()
    program = qc.Program.load(folder / "program")
    result = fit(program, EXAMPLES, SPEC, held_out=HELD_OUT, processes=processes)
    seen = {
        "count": processes.count,
        "losses": result.losses,
        "kept": result.kept,
        "adapters": sums(program),
    }

    def stop(report: StepReport, state: FitState) -> bool:
        return processes.rank == 1 and report.step == 2

    stopping = dataclasses.replace(SPEC, evaluate_every=0, patience=0)
    stopped = fit(program, EXAMPLES, stopping, on_step=stop, processes=processes)
    seen["stopped"] = [stopped.stopped, stopped.step]
    program = qc.Program.load(folder / "program")
    preferring = fit(program, PAIRS, PAIR_SPEC, held_out=PAIRS, processes=processes)
    seen["pairs"] = [preferring.losses, sums(program)]
    program = qc.Program.load(folder / "codes")
    moving = fit(program, EXAMPLES, RANK_SPEC, processes=processes)
    seen["codes"] = [moving.losses, sums(program)]
    (folder / f"{processes.rank}.json").write_text(json.dumps(seen), "utf-8")
    processes.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
