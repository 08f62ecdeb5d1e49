"""The pytest plugin in a project of a user's."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODEL = """
import pytest, torch
import qalora_compile as qc
from qalora_compile.testing import assert_equivalent

@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 8)).eval()
    captured = qc.capture_model(model, (torch.randn(2, 32),))
    return qc.insert_adapters(qc.quantize_groups(captured), qc.AdapterSpec(rank=2))
"""


def test_a_failure_shows_what_the_check_found(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        MODEL
        + """
def test_right(program):
    assert_equivalent(program, qc.fold_adapters(program))

def test_wrong(program):
    folded = qc.fold_adapters(program)
    folded.tensors()["0.offset"][0] += 0.5
    assert_equivalent(program, folded)
"""
    )
    result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*NotEqualError: proof: DIFFERENT", "*first difference: 0: weights differ by up to*"]
    )
    result.stdout.fnmatch_lines(["*qalora: what the check found*", "DIFFERENT: program (folded)*"])
    text = result.stdout.str()
    assert "prove_equivalence(" not in text, "the check's own frames are hidden"


def test_golden_graphs_are_in_the_folder_of_the_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        MODEL + "def test_text(program, qalora_golden):\n    qalora_golden('adapted', program)\n"
    )
    missing = pytester.runpytest_inprocess("-q")
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*adapted.txt is missing: run pytest with --update-golden*"])
    pytester.runpytest_inprocess("-q", "--update-golden").assert_outcomes(passed=1)
    path = pytester.path / "golden" / "adapted.txt"
    pytester.runpytest_inprocess("-q").assert_outcomes(passed=1)
    path.write_text(path.read_text("utf-8").replace("rank", "rang").replace("f32", "f64"), "utf-8")
    changed = pytester.runpytest_inprocess("-q")
    changed.assert_outcomes(failed=1)
    changed.stdout.fnmatch_lines(["*the text is not the golden one:*", "*-*f64*", "*+*f32*"])


def test_the_folder_of_golden_texts_is_a_setting(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nqalora_golden_dir = texts/graphs\n")
    pytester.makepyfile("def test_text(qalora_golden):\n    qalora_golden('a', 'text')\n")
    pytester.runpytest_inprocess("-q", "--update-golden").assert_outcomes(passed=1)
    assert (pytester.path / "texts" / "graphs" / "a.txt").read_text("utf-8") == "text"


def test_programs_are_validated_around_every_pass(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        MODEL
        + """
def break_it(program):
    program.tensors()["0.scale"][0, 0] = float("nan")

def test_unseen(program):
    qc.fold_adapters(program)

def test_seen(program, qalora_validating):
    break_it(program)
    qc.fold_adapters(program)
"""
    )
    result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*InternalError*"])


def test_the_plugin_costs_a_project_nothing_that_does_not_use_it() -> None:
    code = (
        "import sys, qalora_compile.testing.plugin\n"
        "print(*[m for m in ('torch', 'onnx', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
