"""Layers replaced one after another, each seeing what the ones before it became."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.ir.pattern import get_tensor
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.passes.canonicalize.canonicalize_pointwise import CanonicalizePointwise
from qalora_compile.quantizers.calibrate import collect_statistics
from qalora_compile.quantizers.sequential_calibration import _Run, replace_in_order
from qalora_compile.quantizers.statistics import ActivationStatistics
from tests.models import MLP, SquareConv1D, ThreeReaders, UsedTwice, bert, token_ids


def annotated(model: nn.Module, args: tuple[Any, ...]) -> qc.Program:
    program = CanonicalizePointwise()(qc.capture_model(model.eval(), args)).program
    return AnnotateLinears()(program).program


def halved(program: qc.Program, calls: list[Any]) -> dict[str, ActivationStatistics]:
    """Replace every weight by half of it; the statistics seen meanwhile."""
    seen: dict[str, ActivationStatistics] = {}
    sites = {site.path: site for site in program.plan}

    def replace(path: str, statistics: ActivationStatistics) -> Tensor:
        assert path not in seen
        seen[path] = statistics
        weight = get_tensor(program.module, sites[path].weight)
        assert weight is not None
        matrix = weight.detach() / 2
        return matrix.T if sites[path].transposed else matrix

    replace_in_order(program, calls, replace)
    return seen


def test_each_layer_sees_the_layers_before_it_replaced() -> None:
    model = MLP(12, 9, 7, 5).double()
    calls = [torch.randn(n, 12).double() for n in (3, 4)]
    found = halved(annotated(model, (calls[0],)), [(x,) for x in calls])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            parameter.div_(2 if name.endswith("weight") else 1)
    expected = collect_statistics(annotated(changed, (calls[0],)), [(x,) for x in calls])
    assert list(found) == list(expected) == ["layers.0", "layers.1", "layers.2"]
    for path, statistics in expected.items():
        assert found[path].rows == 7
        torch.testing.assert_close(found[path].moment, statistics.moment)
    before = collect_statistics(annotated(model, (calls[0],)), [(x,) for x in calls])
    assert not torch.allclose(found["layers.1"].moment, before["layers.1"].moment)


def test_layers_that_read_one_tensor_are_replaced_together() -> None:
    found = halved(annotated(ThreeReaders(), (torch.randn(2, 64),)), [(torch.randn(9, 64),)])
    assert list(found) == ["q", "k", "v"]
    assert found["q"] is found["v"]


def test_a_weight_with_several_uses_comes_first_with_all_of_them() -> None:
    model, x = UsedTwice().double(), torch.randn(3, 32).double()
    program = annotated(model, (x,))
    found = halved(program, [(x,)])
    assert list(found) == ["shared", "head"]
    complete = collect_statistics(program, [(x,)])["shared"]
    assert found["shared"].rows == 6
    torch.testing.assert_close(found["shared"].moment, complete.moment)
    with torch.no_grad():
        model.shared.weight.div_(2)
        hidden = model.shared(torch.relu(model.shared(x)))
    expected = ActivationStatistics.of(hidden).moment
    torch.testing.assert_close(found["head"].moment, expected)


def test_a_transposed_weight_is_replaced_the_right_way_round() -> None:
    model, x = SquareConv1D(16).double(), torch.randn(3, 16).double()
    stack = nn.Sequential(model, nn.Linear(16, 4).double())
    found = halved(annotated(stack, (x,)), [(x,)])
    with torch.no_grad():
        model.c_proj.weight.div_(2)
        expected = ActivationStatistics.of(model(x)).moment
    torch.testing.assert_close(found["1"].moment, expected)


@pytest.fixture(scope="module")
def encoder() -> qc.Program:
    ids = token_ids(2, 8)
    return annotated(bert(), (ids, torch.ones_like(ids)))


def test_an_encoder_with_padding(encoder: qc.Program) -> None:
    ids = token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = halved(encoder, [(ids, mask), (ids, torch.ones_like(ids))])
    assert found["encoder.layer.0.attention.self.query"].rows == 13 + 16
    assert len(found) == len({site.path for site in encoder.plan.to_quantize()}) == 13


def test_values_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    real = _Run.advance

    def watched(self: _Run, nodes: Any) -> Tensor:
        nonlocal most
        value = real(self, nodes)
        most = max(
            most, sum(isinstance(v, Tensor) and v.shape[:1] == (11,) for v in self.env.values())
        )
        return value

    monkeypatch.setattr(_Run, "advance", watched)
    halved(annotated(MLP(*[6] * 12), (torch.randn(2, 6),)), [(torch.randn(11, 6),)])
    assert most == 1, "of a chain, one value at a time"


def test_a_layer_without_rows_is_named(encoder: qc.Program) -> None:
    ids = token_ids(2, 8)
    with pytest.raises(UserInputError, match="padding|input row") as caught:
        halved(encoder, [(ids, torch.zeros_like(ids))])
    assert caught.value.where == "encoder.layer.0.attention.self.query"
