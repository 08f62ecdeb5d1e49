"""Several processes: what two compute is what one does with twice the micro-batches."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError
from qalora_compile.training import Example, FitSpec, find_processes, fit
from tests.training.test_fit import language_model

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
EXAMPLES = [Example(row, row) for row in ROWS]
"""Of many lengths: the mean of the means of two processes would be another loss."""
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


def test_a_launcher_without_accelerate_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UnsupportedError, match="accelerate is needed to train with several"):
        find_processes()


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_twice_the_accumulation(tmp_path: Path) -> None:
    """Two gloo processes on the CPU, as torchrun starts them, adapter dropout included."""
    program = language_model(dropout=0.2)
    program.save(tmp_path / "program")
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
    half = fit(language_model(dropout=0.2), EXAMPLES, SPEC, held_out=HELD_OUT)
    assert first["losses"] != pytest.approx(half.losses, abs=1e-3), "one process saw all the data"
