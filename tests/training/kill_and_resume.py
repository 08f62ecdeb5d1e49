"""Trainings that kill themselves with SIGKILL at given points, and are resumed; prints JSON rows.

A program of its own: it forks, which is safe only while torch computes with one thread.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import qalora_compile as qc
from qalora_compile.training import FitSpec, FitState, StepReport, fit
from qalora_compile.training.records import checkpoint as module
from qalora_compile.training.records.checkpoint import (
    list_checkpoints,
    remove_unfinished,
    restore_checkpoint,
    save_checkpoint,
)
from qalora_compile.training.records.run_identity import Identity
from tests.training.test_fit import EXAMPLES, adapters, language_model

SPEC = FitSpec(steps=6, batch_size=3, learning_rate=1e-2, seed=3)
POINTS = ("optimizer.safetensors", "state.json", "rename", "prune", "going")


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(function: Callable[..., Any], wanted: Callable[..., bool]) -> Callable[..., Any]:
    """A function that kills its process where it is called with wanted arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if wanted(*args, **kwargs):
            die()
        return function(*args, **kwargs)

    return call


def deadly(point: str) -> Any:
    """What has to be replaced for a checkpoint to be killed at a point while it is written."""
    of_file = lambda *a: any(isinstance(v, Path) and v.name == point for v in a)  # noqa: E731
    writers = {"optimizer.safetensors": "save_tensors", "state.json": "write_sealed"}
    if point in writers:  # the files before it are there, under the temporary name
        name = writers[point]
        return mock.patch.object(module, name, before(getattr(module, name), of_file))
    if point == "rename":  # all files are there, under the temporary name
        return mock.patch.object(os, "rename", die)
    if point == "prune":  # it is written, and an old one is still there
        return mock.patch.object(Path, "rename", die)
    going = lambda path, *_, **__: str(path).endswith(".going")  # noqa: E731
    return mock.patch.object(shutil, "rmtree", before(shutil.rmtree, going))  # an old one goes


def train(folder: Path, step: int, point: str) -> None:
    """Train with a checkpoint after every step, until it is killed."""
    program = language_model(dropout=0.2)
    identity = Identity.of(program, SPEC)

    def on_step(report: StepReport, state: FitState) -> bool:
        if report.step == step and point != "after step":
            with deadly(point):
                save_checkpoint(folder, program, state, identity, keep=1)
        save_checkpoint(folder, program, state, identity, keep=1)
        if report.step == step:
            die()
        return False

    fit(program, EXAMPLES, SPEC, on_step=on_step)


def resume(folder: Path) -> tuple[qc.Program, int]:
    """Go on from the last checkpoint to the end."""
    program = language_model(dropout=0.2)
    state = FitState.fresh(program, SPEC)
    remove_unfinished(folder)
    found = list_checkpoints(folder)
    if found:
        restore_checkpoint(found[-1], program, state, Identity.of(program, SPEC))
    begun = state.step
    fit(program, EXAMPLES, SPEC, state=state)
    return program, begun


def main(root: Path) -> None:
    """Kill and resume at each point, and compare with a training that ran through."""
    uninterrupted = language_model(dropout=0.2)
    fit(uninterrupted, EXAMPLES, SPEC)
    expected = adapters(uninterrupted)
    cases = [(step, "after step") for step in range(1, SPEC.steps)]
    cases += [(4, point) for point in POINTS]
    rows = []
    for step, point in cases:
        folder = root / f"{step} {point}"
        child = os.fork()
        if child == 0:
            train(folder, step, point)
            os._exit(0)  # it outlived its point
        _, status = os.waitpid(child, 0)
        program, begun = resume(folder)
        same = all(torch.equal(expected[n], p) for n, p in adapters(program).items())
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        rows.append(
            {"step": step, "point": point, "killed": killed, "resumed_at": begun, "same": same}
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
