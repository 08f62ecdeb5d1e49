"""Second moments of what layers read, from runs of annotated and of quantized programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.canonicalize_pointwise import CanonicalizePointwise
from qalora_compile.quantizers.calibrate import collect_statistics
from qalora_compile.quantizers.statistics import ActivationStatistics
from tests.models import MLP, ThreeReaders, UsedTwice, adapted, assert_close, bert, token_ids


def annotated(model: nn.Module, args: tuple[Any, ...]) -> qc.Program:
    program = CanonicalizePointwise()(qc.capture_model(model.eval(), args)).program
    return AnnotateLinears()(program).program


def test_every_layer_has_the_moments_of_its_own_input() -> None:
    model, calls = MLP(12, 7, 5).double(), [torch.randn(n, 12).double() for n in (2, 5)]
    program = annotated(model, (calls[0],))
    found = collect_statistics(program, [(calls[0],), {"x": calls[1]}])
    x = torch.cat(calls)
    expected = {"layers.0": x, "layers.1": torch.tanh(model.layers[0](x))}
    assert list(found) == list(expected)
    for path, rows in expected.items():
        assert found[path].rows == 7
        torch.testing.assert_close(found[path].moment, ActivationStatistics.of(rows).moment)


def test_a_quantized_program_gives_what_its_own_layers_read() -> None:
    model, x = MLP(16, 8, 4), torch.randn(6, 16)
    program = qc.quantize_groups(qc.capture_model(model, (x,)), qc.QuantSpec(bits=2))
    after_first = torch.tanh(first_layer(program, x))
    found = collect_statistics(program, [(x,)], ["layers.1"])
    assert list(found) == ["layers.1"]
    torch.testing.assert_close(
        found["layers.1"].moment, ActivationStatistics.of(after_first).moment
    )


def first_layer(program: qc.Program, x: Tensor) -> Tensor:
    parts = [program.tensors()[f"layers.0.{name}"] for name in ("qweight", "scale", "offset")]
    bias = program.tensors()["layers.0.bias"]
    y: Tensor = torch.ops.qalora.group_linear(x, *parts, bias, 2, 32)
    return y


def test_layers_that_read_one_tensor_share_one_moment() -> None:
    found = collect_statistics(
        annotated(ThreeReaders(), (torch.randn(2, 64),)), [(torch.randn(9, 64),)]
    )
    assert found["q"] is found["k"] is found["v"]


def test_uses_of_one_weight_are_merged() -> None:
    model, x = UsedTwice().double(), torch.randn(3, 32).double()
    found = collect_statistics(annotated(model, (x,)), [(x,)])
    rows = torch.cat([x, torch.relu(model.shared(x))])
    assert found["shared"].rows == 6
    torch.testing.assert_close(found["shared"].moment, ActivationStatistics.of(rows).moment)


@pytest.fixture(scope="module")
def masked() -> qc.Program:
    ids = token_ids(2, 8)
    return annotated(bert(), (ids, torch.ones_like(ids)))


def test_padding_does_not_count(masked: qc.Program) -> None:
    ids = token_ids(2, 8)
    short = (ids, torch.ones_like(ids))
    padding = torch.zeros(2, 4, dtype=torch.int64)
    padded = (torch.cat([ids, token_ids(2, 4)], 1), torch.cat([torch.ones_like(ids), padding], 1))
    found, expected = (collect_statistics(masked, [call]) for call in (padded, short))
    assert len(found) == 13
    for path, statistics in expected.items():
        assert found[path].rows == statistics.rows == (2 if "pooler" in path else 16)
        assert_close(found[path].moment, statistics.moment, relative=1e-5)


def test_data_of_nothing_but_padding_are_refused(masked: qc.Program) -> None:
    ids = token_ids(2, 8)
    with pytest.raises(UserInputError, match="no input row") as caught:
        collect_statistics(masked, [(ids, torch.zeros_like(ids))])
    assert caught.value.where == "encoder.layer.0.attention.self.query"


def test_nan_is_refused_with_the_layer() -> None:
    program = annotated(MLP(4, 4, 4), (torch.randn(2, 4),))
    with pytest.raises(UserInputError, match="NaN") as caught:
        collect_statistics(program, [(torch.full((2, 4), float("nan")),)])
    assert caught.value.where == "layers.0"


def test_bad_requests_are_refused() -> None:
    program = annotated(MLP(4, 4), (torch.randn(2, 4),))
    with pytest.raises(UserInputError, match="no calibration data"):
        collect_statistics(program, [])
    with pytest.raises(UserInputError, match="no layer 'fc'"):
        collect_statistics(program, [(torch.randn(2, 4),)], ["fc"])
    with pytest.raises(UserInputError, match="shape"):
        collect_statistics(program, [(torch.randn(2, 5),)])
    with pytest.raises(PreconditionError, match="adapted"):
        collect_statistics(adapted(MLP(4, 4), (torch.randn(2, 4),)), [(torch.randn(2, 4),)])


def test_nothing_runs_after_the_last_layer_asked_for() -> None:
    model, x = MLP(4, 4, 4), torch.randn(2, 4)
    program = annotated(model, (x,))
    with torch.no_grad():
        program.tensors()["layers.0.weight"].fill_(float("nan"))
    assert collect_statistics(program, [(x,)], ["layers.0"])["layers.0"].rows == 2
    with pytest.raises(UserInputError, match="NaN"):
        collect_statistics(program, [(x,)])


def test_the_mode_is_restored() -> None:
    program = annotated(MLP(4, 4), (torch.randn(2, 4),)).train()
    collect_statistics(program, [(torch.randn(2, 4),)])
    assert program.module.training
