"""Programs against programs and ONNX Runtime, and faults that have to be found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.verify.equivalence import AFTER_LAST_SITE
from qalora_compile.verify.inputs import sample_inputs
from tests.models import MLP, bert, llama, slow, token_ids

TIGHT = qc.Tolerance(max_rel=1e-5)


def adapted(model: nn.Module, *args: Tensor) -> qc.Program:
    program = qc.quantize_groups(qc.capture_model(model.eval(), args), qc.QuantSpec(group_size=16))
    program = qc.insert_adapters(program, qc.AdapterSpec(rank=2))
    for name, parameter in program.named_adapter_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return program


@pytest.fixture
def mlp() -> qc.Program:
    return adapted(MLP(40, 32, 24, 8), torch.randn(4, 40))


def calls(program: qc.Program, count: int = 3) -> list[dict[str, Tensor]]:
    return sample_inputs(program, count)


def test_folding_is_verified_per_layer_and_for_outputs(mlp: qc.Program) -> None:
    report = qc.verify_equivalence(mlp, qc.fold_adapters(mlp), calls(mlp), TIGHT)
    assert report.passed
    assert report.first_divergence is None
    assert [c.name for c in report.sites] == [s.name for s in mlp.plan]
    assert 0 < report.sites[0].max_abs < 1e-4  # reassociation: not the same object twice


def test_the_worst_of_each_input_is_kept(mlp: qc.Program) -> None:
    folded = qc.fold_adapters(mlp)
    report = qc.verify_equivalence(mlp, folded, calls(mlp), TIGHT)
    assert [row.name for row in report.by_input] == ["input 0", "input 1", "input 2"]
    assert max(row.max_abs for row in report.by_input) == report.max_abs
    alone = qc.verify_equivalence(mlp, folded, calls(mlp)[1:2], TIGHT)
    assert alone.max_abs == report.by_input[1].max_abs
    assert len(report.to_json()["by_input"]) == 3


class BadlyConditioned(nn.Module):
    """A model that makes much of a rounding: no fault of whoever computes it otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Tensor:
        """A rounding of the layer moves the result by a thousandth."""
        return torch.sin(2e4 * self.fc(x))


JUDGED = qc.Tolerance(max_rel=1e-4, rounding=True)


def test_what_rounding_does_to_the_reference_is_no_difference() -> None:
    torch.manual_seed(0)
    program = adapted(BadlyConditioned(), torch.randn(4, 40))
    folded = qc.fold_adapters(program)
    figures = qc.verify_equivalence(program, folded, calls(program), qc.Tolerance(max_rel=1e-4))
    checked = qc.verify_equivalence(program, folded, calls(program), JUDGED)
    assert figures.outputs[0].max_rel > 1e-4 and not figures.passed
    assert checked.passed and checked.outputs[0].rounding is not None
    assert 0 < checked.outputs[0].rounding < 8


def test_what_rounding_does_not_explain_is_a_difference_however_small(mlp: qc.Program) -> None:
    folded = qc.fold_adapters(mlp)
    tensors = folded.tensors()
    name = next(name for name in tensors if name.endswith(".offset"))
    tensors[name] = tensors[name] + 2e-6 * tensors[name].abs().max()
    other = folded.evolve(graph=folded.copy_graph(), tensors=tensors)
    figures = qc.verify_equivalence(mlp, other, calls(mlp), qc.Tolerance(max_rel=1e-4))
    checked = qc.verify_equivalence(mlp, other, calls(mlp), JUDGED)
    assert figures.passed
    assert not checked.passed and (checked.outputs[0].rounding or 0) > 64


def test_an_exported_model_is_compared_by_rounding_too(mlp: qc.Program, tmp_path: Path) -> None:
    folded = qc.fold_adapters(mlp)
    path = tmp_path / "model.onnx"
    qc.export_model(folded, path)
    report = qc.verify_equivalence(folded, path, calls(folded), JUDGED)
    assert report.passed and (report.outputs[0].rounding or 9) < 8
    with pytest.raises(UserInputError, match="the reference is not a program"):
        qc.verify_equivalence(path, folded, calls(folded), JUDGED)


def test_quantizing_is_no_equivalence() -> None:
    model = MLP(40, 32, 8)
    program = qc.capture_model(model.eval(), (torch.randn(4, 40),))
    coarse = qc.quantize_groups(program, qc.QuantSpec(bits=2, group_size=40))
    assert not qc.verify_equivalence(program, coarse, calls(program), TIGHT).passed


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_first_diverging_site_is_named(mlp: qc.Program, index: int) -> None:
    folded = qc.fold_adapters(mlp)
    site = mlp.plan.sites[index]
    folded.tensors()[f"{site.path}.offset"][0] += 0.05
    report = qc.verify_equivalence(mlp, folded, calls(mlp), TIGHT)
    assert not report.passed
    assert report.first_divergence == site.name


def test_a_difference_outside_every_site_is_said_to_be() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 8)
            self.factor = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.factor

    program = adapted(Scaled(), torch.randn(4, 16))
    folded = qc.fold_adapters(program)
    tensors = folded.tensors()
    factor = nn.Parameter(tensors["factor"] * 2, requires_grad=False)
    folded = folded.evolve(graph=folded.copy_graph(), tensors=tensors | {"factor": factor})
    report = qc.verify_equivalence(program, folded, calls(program), TIGHT)
    assert report.first_divergence == AFTER_LAST_SITE


@pytest.mark.parametrize("build", [bert, *slow(llama)])
def test_onnx_runtime_is_verified_site_by_site(build: object, tmp_path: Path) -> None:
    assert callable(build)
    program = adapted(build(), token_ids(2, 16))
    folded = qc.fold_adapters(program)
    qc.export_model(folded, tmp_path / "model.onnx")
    report = qc.verify_equivalence(
        folded, tmp_path / "model.onnx", calls(folded), qc.Tolerance(max_rel=1e-4)
    )
    assert report.passed
    assert [c.name for c in report.sites] == [s.name for s in folded.plan.to_quantize()]


def test_a_fault_in_an_exported_file_is_found_and_named(mlp: qc.Program, tmp_path: Path) -> None:
    folded = qc.fold_adapters(mlp)
    wrong = qc.fold_adapters(mlp)
    site = mlp.plan.sites[1]
    wrong.tensors()[f"{site.path}.offset"][0] += 0.1  # each fold has its own offsets
    qc.export_model(wrong, tmp_path / "model.onnx")
    report = qc.verify_equivalence(folded, tmp_path / "model.onnx", calls(mlp), TIGHT)
    assert not report.passed
    assert report.first_divergence == site.name


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    program = adapted(model, torch.randn(4, 32)).train()
    folded = qc.fold_adapters(program)
    assert qc.verify_equivalence(program, folded, calls(program), TIGHT).passed
    assert program.module.training


def test_saved_programs_and_folders_are_verified_by_path(mlp: qc.Program, tmp_path: Path) -> None:
    folded = qc.fold_adapters(mlp)
    folded.save(tmp_path / "folded")
    assert qc.verify_equivalence(tmp_path / "folded", mlp, calls(mlp), TIGHT).passed


def test_positional_tuples_and_keyword_dicts_are_calls(mlp: qc.Program) -> None:
    x = torch.randn(2, 40)
    for call in ((x,), {mlp.signature.inputs[0].name: x}):
        assert qc.verify_equivalence(mlp, mlp, [call], qc.Tolerance(max_abs=0.0)).passed


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_a_path_that_cannot_be_compared_is_refused(
    mlp: qc.Program, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserInputError):
        qc.verify_equivalence(mlp, path, calls(mlp), TIGHT)


def test_no_input_and_wrong_inputs_are_refused(mlp: qc.Program) -> None:
    with pytest.raises(UserInputError, match="no input"):
        qc.verify_equivalence(mlp, mlp, [], TIGHT)
    with pytest.raises(UserInputError, match="shape"):
        qc.verify_equivalence(mlp, mlp, [(torch.randn(2, 41),)], TIGHT)


def test_sampled_inputs_follow_the_signature() -> None:
    program = qc.capture_model(llama().eval(), (token_ids(2, 16),))
    vocabulary = 128
    shapes = set()
    for call in sample_inputs(program, 4):
        (ids,) = call.values()
        assert ids.dtype == torch.int64
        assert 0 <= int(ids.min()) <= int(ids.max()) < vocabulary
        shapes.add(tuple(ids.shape))
    assert len(shapes) > 1
    first, again = (sample_inputs(program, 2, seed=5) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
