"""Several processes: what two compute is what one does with twice the micro-batches."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError
from qalora_compile.training import Batches, Example, FitSpec, find_processes, fit
from qalora_compile.training.distributed import Processes
from tests.training.test_fit import adapters, language_model

SPEC = FitSpec(
    steps=6,
    batch_size=2,
    accumulate=2,
    learning_rate=1e-3,
    lora_plus_ratio=2.0,
    evaluate_every=2,
    patience=3,
    seed=3,
)
ROWS = [tuple(range(start, start + size)) for start in (10, 20, 30) for size in (3, 5, 8, 13)]
SILENT = Example((5, 6, 7), (-100, -100, -100))
EXAMPLES = [Example(row, row) for row in ROWS] + [SILENT] * 6
"""Of many lengths: the mean of the means of two processes would be another loss. Some hold nothing
to learn, and so does a micro-batch of them."""
PAIRS = [
    dataclasses.replace(Example(row, row), rejected=Example(row[::-1], row[::-1])) for row in ROWS
]
PAIR_SPEC = dataclasses.replace(SPEC, loss="dpo", neftune_alpha=1.0, patience=0)
RANK_SPEC = dataclasses.replace(SPEC, evaluate_every=0, patience=0, adaptive_rank=2.0)
"""Codes train too, and ranks move: both by gradients that all processes share."""
HELD_OUT = [Example(row[::-1], row[::-1]) for row in ROWS]


def sums(program: qc.Program) -> dict[str, float]:
    """A number for each adapter."""
    return {
        name: float(p.detach().double().sum()) for name, p in program.named_adapter_parameters()
    }


def test_without_a_launcher_this_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = find_processes()
    assert (processes.rank, processes.count, processes.is_first) == (0, 1, True)
    assert processes.sum(2.5) == 2.5


def test_a_launcher_without_accelerate_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UnsupportedError, match="accelerate is needed to train with several"):
        find_processes()


class Half(Processes):
    """The first of two processes; the other one gives what is written here, sum by sum."""

    count = 2

    def __init__(self, *others: float) -> None:
        self.others = list(others)

    def sum(self, value: float) -> float:
        return value + self.others.pop(0)


def test_a_process_without_anything_to_learn_adds_nothing() -> None:
    """Targets, tokens and loss of the other process, for the step and once more after it."""
    program = language_model(init_b=0.05)
    before = adapters(program)
    processes = Half(10, 12, 2.5, 0, 10, 12, 2.25)
    result = fit(program, [SILENT] * 2, FitSpec(steps=1, batch_size=2), processes=processes)
    assert result.losses == (2.5,)
    assert not processes.others
    assert all(torch.equal(before[n], p) for n, p in adapters(program).items())


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_twice_the_accumulation(tmp_path: Path) -> None:
    """Two gloo processes on the CPU, as torchrun starts them, adapter dropout included."""
    batches = Batches(EXAMPLES, batch_size=SPEC.batch_size, seed=SPEC.seed)
    assert 0 in [int(batches.at(index).targets.sum()) for index in range(4 * SPEC.steps)]
    program = language_model(dropout=0.2)
    program.save(tmp_path / "program")
    language_model(kind="qat").save(tmp_path / "codes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.training.two_processes", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, timeout=300)
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    assert first == second
    assert first["count"] == 2
    assert first["stopped"] == [True, 2]
    alone = dataclasses.replace(SPEC, accumulate=2 * SPEC.accumulate)
    result = fit(program, EXAMPLES, alone, held_out=HELD_OUT)
    assert first["losses"] == pytest.approx(result.losses, abs=1e-5)
    assert first["kept"] == result.kept
    assert first["adapters"] == pytest.approx(sums(program), abs=1e-3)
    program = qc.Program.load(tmp_path / "program")
    alone = dataclasses.replace(PAIR_SPEC, accumulate=2 * PAIR_SPEC.accumulate)
    losses, adapted = first["pairs"]
    assert losses == pytest.approx(fit(program, PAIRS, alone, held_out=PAIRS).losses, abs=1e-5)
    assert adapted == pytest.approx(sums(program), abs=1e-3)
    program = qc.Program.load(tmp_path / "codes")
    alone = dataclasses.replace(RANK_SPEC, accumulate=2 * RANK_SPEC.accumulate)
    losses, adapted = first["codes"]
    assert losses == pytest.approx(fit(program, EXAMPLES, alone).losses, abs=1e-5)
    assert adapted == pytest.approx(sums(program), abs=1e-3)
    half = fit(language_model(dropout=0.2), EXAMPLES, SPEC, held_out=HELD_OUT)
    assert first["losses"] != pytest.approx(half.losses, abs=1e-3), "one process saw all the data"
