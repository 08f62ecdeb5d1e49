"""Every planted fault is caught by the proof and by the numeric checks, and named.

`make mutation-score` prints what each check makes of each.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import qalora_compile as qc
from tests.verify.model_faults import MODEL_FAULTS
from tests.verify.planted import SPECS, Fault, along_the_graph, compare, examine, program
from tests.verify.program_faults import PROGRAM_FAULTS
from tests.verify.score import is_bisected, is_right

FAULTS = [*PROGRAM_FAULTS, *MODEL_FAULTS]


def test_faults_are_planted_everywhere_and_their_names_tell_them_apart() -> None:
    lowered = {f"program lowered:{name}" for name in SPECS}
    assert {"program adapted", "program folded", *lowered, *SPECS} <= {f.on for f in FAULTS}
    assert len({(fault.name, fault.on) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("name", SPECS)
def test_without_a_fault_every_check_finds_them_equal(name: str, models: Path) -> None:
    path = models / f"{name}.onnx"
    certificate = qc.prove_equivalence(program("folded"), path)
    assert certificate.proved, certificate
    assert compare(program("folded"), path) == (False, "")
    assert along_the_graph(program("folded"), path) == ("EQUAL", "")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.on}: {fault.name}")
def test_a_planted_fault_is_caught_and_named(fault: Fault, models: Path, tmp_path: Path) -> None:
    found = examine(fault, models, tmp_path)
    assert is_right(found), found
    assert is_bisected(found), found
