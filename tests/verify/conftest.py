"""What the checks of many faults share: the right exports, and runs of the right programs."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.verify.numeric import references, rounding
from qalora_compile.verify.numeric.run_float64 import Values, run_reference
from tests.verify.planted import export_all

_RUNS = 100
"""How many runs are kept."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file for each of `planted.SPECS`."""
    folder = tmp_path_factory.mktemp("models")
    export_all(folder)
    return folder


class _Remembered:
    """`run_reference`, once for one program, its inputs and the nodes that are asked for."""

    def __init__(self) -> None:
        self._runs: dict[Hashable, tuple[Values, Values]] = {}
        self._programs: dict[int, qc.Program] = {}

    def __call__(
        self,
        program: qc.Program,
        leaves: Sequence[Any],
        names: Collection[str],
        working: torch.dtype,
    ) -> tuple[Values, Values]:
        tensors = tuple((id(t), t._version) for t in program.tensors().values())
        inputs = tuple(map(_of_leaf, leaves))
        key = (id(program), str(program.graph), tensors, inputs, frozenset(names), working)
        if key not in self._runs:
            if len(self._runs) == _RUNS:
                self._runs.pop(next(iter(self._runs)))
            self._programs[id(program)] = program  # no later one gets its number
            self._runs[key] = run_reference(program, leaves, names, working)
        exact, own = self._runs[key]
        return dict(exact), dict(own)


def _of_leaf(leaf: Any) -> Hashable:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    plain = leaf.detach().contiguous().reshape(-1)
    return str(leaf.dtype), tuple(leaf.shape), plain.view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="package", autouse=True)
def _reference_runs() -> Iterator[None]:
    """A program that many faults are compared with runs once on the same inputs."""
    remembered = _Remembered()
    with pytest.MonkeyPatch.context() as patch:
        for module in (references, rounding):
            patch.setattr(module, "run_reference", remembered)
        yield
