"""Capture: equal to eager at sizes it never saw, in both modes, with errors that point."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.errors import CaptureError, UserInputError
from tests.models import MLP, TRANSFORMERS, OneLinear, outputs, token_ids, worst

pytestmark = pytest.mark.usefixtures("traced_anew")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_equal_eager_at_other_sizes(name: str) -> None:
    model = TRANSFORMERS[name]()
    program = qc.capture_model(model, (token_ids(2, 16),))
    assert program.signature.inputs[0].shape == ("batch", "sequence")
    for shape in ((2, 16), (1, 1), (3, 37)):
        ids = token_ids(*shape)
        assert worst(program(ids), model(ids)) < 1e-5
    assert program.notes == ()


def test_the_example_that_is_too_small_is_noted() -> None:
    program = qc.capture_model(MLP(16, 8).eval(), (torch.randn(1, 16),))
    assert program.signature.inputs[0].shape == (1, 16)
    assert "axis 0 is fixed at 1" in program.notes[0]
    with pytest.raises(UserInputError, match=r"takes \[1, 16\]"):
        program(torch.randn(2, 16))


def test_explicit_dimensions_are_obeyed() -> None:
    x = torch.randn(4, 6, 16)
    program = qc.capture_model(OneLinear(16, 4), (x,), dynamic_shapes={"x": {0: Dim("rows")}})
    assert program.signature.inputs[0].shape == ("batch", 6, 16)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the error has to show
            return x
        return -x


def test_the_error_of_a_model_that_cannot_be_captured_names_the_line() -> None:
    with pytest.raises(CaptureError, match="cannot capture Branching") as caught:
        qc.capture_model(Branching(), (torch.randn(2, 4),))
    where = str(caught.value.where)
    assert inspect.getsourcefile(Branching) is not None
    assert f"{inspect.getsourcefile(Branching)}:" in where
    assert "if x.sum() > 0" in where
    assert caught.value.hint


class FixedBatch(nn.Module):
    """Unrolls over its batch, so export must fix it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.fc(row) for row in x])


def test_a_size_that_must_be_fixed_is_fixed() -> None:
    model, x = FixedBatch().eval(), torch.randn(3, 8)
    program = qc.capture_model(model, (x,))
    assert program.signature.inputs[0].shape == (3, 8)
    assert worst(program(x), model(x)) == 0.0
    with pytest.raises(UserInputError, match=r"takes \[3, 8\]"):
        program(torch.randn(5, 8))


class ManyOutputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.kind = kind

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Any:
        y = self.fc(x) + shift
        if self.kind == "dict":
            return {"mean": y.mean(-1), "logits": y}
        return (y, [y * 2, (y * 3,)])


def test_dicts_and_nested_outputs_come_back_as_they_are() -> None:
    x = torch.randn(3, 8)
    for kind, names in (("dict", ("mean", "logits")), ("nested", ("output_0",))):
        model = ManyOutputs(kind).eval()
        program = qc.capture_model(model, (x,), {"shift": 0.5})
        found, expected = program(x, shift=0.5), model(x, shift=0.5)
        assert type(found) is type(expected)
        assert worst(found, expected) == 0.0
        assert program.signature.outputs[: len(names)] == names
        assert len(program.signature.outputs) == len(outputs(expected))


@pytest.mark.slow
def test_a_transformers_output_has_its_fields() -> None:
    program = qc.capture_model(TRANSFORMERS["llama"](), (), {"input_ids": token_ids(2, 8)})
    assert program.signature.outputs == ("logits",)
    assert program(input_ids=token_ids(1, 3)).logits.shape == (1, 3, 128)


class Dropping(nn.Module):
    """Attention whose dropout depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)[:, None]
        p = 0.4 if self.training else 0.0
        return functional.scaled_dot_product_attention(y, y, y, dropout_p=p)


@pytest.mark.parametrize("capture_in_training", [True, False])
def test_both_modes_equal_eager_with_one_seed(capture_in_training: bool) -> None:
    model, x = Dropping(), torch.randn(2, 5, 16)
    program = qc.capture_model(model.train(capture_in_training), (x,))
    for training in (True, False):
        model.train(training)
        if training:
            program.train()
        else:
            program.eval()
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        assert worst(program(x), expected) == 0.0
    model.train()
    assert worst(model(x), program(x)) > 0, "dropout does something"


class OtherInTraining(nn.Module):
    """Takes another path in training, which evaluation must not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y * 2 if self.training else y


def test_a_model_with_two_paths_is_captured_in_its_own_mode() -> None:
    model, x = OtherInTraining().eval(), torch.randn(3, 8)
    assert worst(qc.capture_model(model, (x,))(x), model(x)) == 0.0


def test_capture_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).eval()
    model[1].train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    qc.capture_model(model, (torch.randn(4, 8),))
    assert [m.training for m in model.modules()] == [False, False, True, False]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("args", [(), (torch.randn(2, 8), torch.randn(2, 8))])
def test_examples_that_do_not_fit_are_refused(args: tuple[Tensor, ...]) -> None:
    with pytest.raises(UserInputError, match="the model does not run on the example"):
        qc.capture_model(OneLinear(8, 4), args)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(UserInputError, match="not a torch.nn.Module"):
        qc.capture_model(lambda x: x, (torch.randn(2, 8),))  # type: ignore[arg-type]


def test_the_size_of_images_is_said_to_be_fixed_and_can_vary() -> None:
    """Torch makes height and width constants unless it is asked not to."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    fixed = qc.capture_model(model.eval(), (torch.randn(2, 3, 16, 20),))
    (note,) = fixed.notes
    assert "axes 2 and 3 are fixed at 16 × 20" in note and "dynamic_shapes" in note
    with pytest.raises(UserInputError, match="16, 20"):
        fixed(torch.randn(2, 3, 24, 24))
    axes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    free = qc.capture_model(model, (torch.randn(2, 3, 16, 20),), dynamic_shapes=(axes,))
    assert free.notes == ()
    other = torch.randn(2, 3, 24, 31)
    assert torch.allclose(free(other), model(other), atol=1e-6)


class Branches(nn.Module):
    """Decides by a value."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_a_refusal_prints_no_graph_and_no_traceback(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    with pytest.raises(CaptureError, match="data-dependent"):
        qc.capture_model(Branches(), (torch.randn(2, 8),))
    with pytest.raises(UserInputError, match="mat1 and mat2 shapes cannot be multiplied") as caught:
        qc.capture_model(nn.Linear(8, 8), (torch.randn(2, 9),))
    assert "does not run on the example" in caught.value.what
    assert capfd.readouterr() == ("", "")
