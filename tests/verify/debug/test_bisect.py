"""`bisect`: the pass, the place, and a reproduction that fails by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.errors import UserInputError
from qalora_compile.passes.fold_adapters import FoldAdapters
from qalora_compile.passes.framework.base import PassResult
from qalora_compile.verify import named_inputs
from qalora_compile.verify.debug.bisect import Step, bisect
from qalora_compile.verify.debug.write_repro import write_repro
from tests import forked
from tests.models import MLP, adapted
from tests.verify.planted import bisected, is_in_a_pass, program, with_tensors
from tests.verify.program_faults import PROGRAM_FAULTS

ROOT = Path(__file__).parents[3]
IN_A_PASS = {f"{f.on}: {f.name}": f for f in PROGRAM_FAULTS if is_in_a_pass(f)}
FEW = [
    "program folded: pooling: sum for mean",
    "program folded: activation replaced",
    "program folded: cast to half and back",
    "program lowered:ort-stock: correction dropped",
    "program lowered:ort: zero-point rounded for ort",
]
"""`make mutation-score` tries all of them."""


def shifted(source: qc.Program, size: float) -> qc.Program:
    return with_tensors(source, {f"{source.plan.sites[0].path}.bias": lambda t: t + size})


def run_script(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(folder / "repro.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("name", FEW)
def test_the_step_and_the_place_of_a_planted_fault_are_named(name: str, tmp_path: Path) -> None:
    fault = IN_A_PASS[name]
    culprit = bisected(fault)
    assert culprit is not None and culprit.row is not None
    assert culprit.step == ("fold" if fault.on == "program folded" else "lower")
    assert f"{culprit.row.name}:".startswith(fault.node or fault.site)
    assert culprit.row.name in str(culprit)
    folder = write_repro(culprit, tmp_path / "found")
    parts = [qc.Program.load(folder / side) for side in ("before", "after")]
    complete = sum(n.op == "call_function" for n in culprit.before.graph.nodes)
    assert sum(n.op == "call_function" for n in parts[0].graph.nodes) <= complete / 3
    assert set(load_file(folder / "inputs.safetensors")) == {
        leaf.name for leaf in parts[1].signature.inputs
    }


def test_a_pipeline_without_a_fault_has_no_culprit() -> None:
    steps = [Step("fold", program("folded")), Step("lower", program("lowered:digits"))]
    assert bisect(program("adapted"), steps) is None


def test_what_a_later_step_undoes_is_found() -> None:
    folded = program("folded")
    wrong = with_tensors(folded, {"q.bias": lambda t: t + 0.1})
    found = bisect(folded, [Step("break", wrong), Step("mend", folded)])
    assert found is not None and found.step == "break" and found.site == "q"


def test_a_lossy_step_is_not_checked_and_later_steps_are_compared_with_it() -> None:
    captured = qc.capture_model(MLP(40, 24), (torch.randn(2, 40),))
    quantized = qc.quantize_groups(captured)
    steps = [Step("quantize", quantized, lossy=True), Step("again", shifted(quantized, 0.01))]
    found = bisect(captured, steps)
    assert found is not None and found.step == "again"
    assert bisect(captured, steps[:1]) is None
    found = bisect(captured, [Step("quantize", quantized)])
    assert found is not None and found.step == "quantize"


def test_steps_that_are_each_within_rounding_are_found_together(tmp_path: Path) -> None:
    folded = qc.fold_adapters(adapted(MLP(40, 24), (torch.randn(2, 40),)))
    calls = {"random": named_inputs(folded, 1)["random 0"]}
    steps = [Step(f"step {i}", shifted(folded, 1e-6 * i)) for i in range(1, 8)]
    found = bisect(folded, steps, calls)
    assert found is not None and found.cumulative and found.index > 0
    assert "with the steps before it" in str(found)
    assert "complete" in (write_repro(found, tmp_path / "r") / "README.txt").read_text()


def test_a_step_that_loses_an_output_is_found_and_reproduced(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.fc(x)
            return {"y": y, "z": y.tanh()}

    class One(Two):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.fc(x)}

    two = Two().eval()
    one = One().eval()
    one.load_state_dict(two.state_dict())
    before, after = (
        qc.quantize_groups(qc.capture_model(model, (torch.randn(3, 32),))) for model in (two, one)
    )
    found = bisect(before, [Step("lose", after)])
    assert found is not None and found.row is not None and found.row.name == "output z"
    write_repro(found, tmp_path / "found")
    assert "has no such output" in forked.script(tmp_path / "found" / "repro.py").wait()[1]


def test_the_script_quotes_the_names_of_a_file(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    name = f'""" + str(open({str(marker)!r}, "w")) + """'
    folded = qc.fold_adapters(adapted(MLP(40, 24), (torch.randn(2, 40),)))
    found = bisect(folded, [Step(name, shifted(folded, 0.1))])
    assert found is not None
    made = write_repro(found, tmp_path / "found")
    ended, output, _ = forked.script(made / "repro.py", folder=Path("/")).wait()
    assert ended == 1 and name in output
    assert not marker.exists()


def test_no_steps_are_refused() -> None:
    with pytest.raises(UserInputError, match="no step"):
        bisect(program("folded"), [])


def forget_the_tail(self: FoldAdapters, source: qc.Program) -> PassResult:
    """What folding does, with the second group of the second layer left out."""
    result = RIGHT(self, source)
    name = f"{source.plan.sites[1].path}.offset"

    def change(offset: torch.Tensor) -> torch.Tensor:
        offset[:, 1] = source.tensors()[name][:, 1]
        return offset

    return PassResult(with_tensors(result.program, {name: change}), result.changes, result.skips)


RIGHT: Any = FoldAdapters.call


@pytest.mark.slow
def test_the_command_line_finds_a_faulty_pass_and_writes_what_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = adapted(MLP(40, 64, 8), (torch.randn(2, 40),), size=0.3)
    source.save(tmp_path / "program")
    words = ["bisect", str(tmp_path / "program"), "--target", "ort-stock"]
    assert main(words) == 0
    assert "every pass preserves" in capsys.readouterr().out

    monkeypatch.setattr(FoldAdapters, "call", forget_the_tail)
    assert main([*words, "--out", str(tmp_path / "found"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["culprit"]
    assert (found["pass"], found["site"], found["value"]) == (
        "fold-adapters", "layers.1", "layers.1",
    )  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "found")]) == 2, "it exists"

    shown = run_script(tmp_path / "found")
    assert shown.returncode == 1, shown.stderr
    assert "DIFFERENT" in shown.stdout and "first: layers.1: off by" in shown.stdout
    readme = (tmp_path / "found" / "README.txt").read_text("utf-8")
    assert "fold-adapters changes what is computed at layers.1" in readme
    assert "operators" in readme
    assert run_script(tmp_path / "found", "--again").returncode == 0, "folded rightly, it passes"


def test_the_command_line_takes_models_and_pipelines(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bisect", "tests.verify.debug.test_bisect:factory", "--passes"]
    assert main([*words, "annotate-linears,quantize-groups{group-size=8},insert-adapters"]) == 0
    shown = capsys.readouterr().out
    assert "not judged" in shown and "quantize-groups" in shown
    assert main([*words, "no-such-pass"]) == 2
    assert main([*words[:2], "--target", "ort"]) == 2
    assert "cannot be lowered" in capsys.readouterr().err
    for target in ("gguf", "float", "no-such-target"):
        assert main([*words[:2], "--target", target]) == 2
        shown = capsys.readouterr().err
        assert f"no passes run for the target {target}" in shown and "ort-stock" in shown


def factory() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]:
    return MLP(16, 24, 8).eval(), (torch.randn(2, 16),), {}
