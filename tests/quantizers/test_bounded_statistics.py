"""Statistics in parts: the same numbers, and never more of them than memory is meant for."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.ir.signature import Call
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.quantizers import bounded_statistics
from qalora_compile.quantizers.bounded_statistics import StatisticsInParts
from qalora_compile.quantizers.calibrate import collect_statistics
from qalora_compile.quantizers.statistics import ActivationStatistics
from tests.models import MLP, ThreeReaders


def annotated(model: torch.nn.Module, x: torch.Tensor) -> qc.Program:
    return AnnotateLinears()(qc.capture_model(model.eval(), (x,))).program


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The paths of each collection."""
    found: list[list[str]] = []

    def collect(
        program: qc.Program, calls: Iterable[Call], sites: Iterable[str]
    ) -> dict[str, ActivationStatistics]:
        found.append(list(sites))
        return collect_statistics(program, calls, found[-1])

    monkeypatch.setattr(bounded_statistics, "collect_statistics", collect)
    return found


@pytest.mark.parametrize(("most", "parts"), [(0, 4), (2 * 8 * 16**2, 2), (1 << 30, 1)])
def test_parts_give_what_all_at_once_gives(
    most: int, parts: int, collected: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_statistics, "_MOST_BYTES", most)
    x = torch.randn(20, 16)
    program = annotated(MLP(16, 16, 16, 16, 4), x)
    complete = collect_statistics(program, [(x,)])
    found = StatisticsInParts(program, iter([(x,)]))
    assert list(found) == list(complete) and len(found) == 4
    for _ in range(2):  # a second reading collects again what was dropped
        for path, statistics in complete.items():
            assert torch.equal(found[path].moment, statistics.moment)
            assert len(found._held) <= 4 // parts
    assert [path for part in collected[:parts] for path in part] == list(complete)
    assert len(collected) == (1 if parts == 1 else 2 * parts)
    assert found.get("nothing") is None


def test_layers_that_read_one_tensor_count_once(
    collected: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_statistics, "_MOST_BYTES", 8 * 64**2)
    x = torch.randn(9, 64)
    found = StatisticsInParts(annotated(ThreeReaders(), x), [(x,)])
    assert found["q"] is found["k"] is found["v"]
    assert len(collected) == 1


def test_chosen_bits_and_starts_do_not_depend_on_the_parts(
    collected: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 24)
    captured = qc.capture_model(MLP(24, 24, 16, 8).eval(), (x,))
    quant = qc.QuantSpec(bits="auto", budget=3.5, group_size=8, refine_offsets=False)
    adapter = qc.AdapterSpec(rank="auto", rank_budget=150, init="svd")
    made = []
    for most in (1 << 30, 0):
        monkeypatch.setattr(bounded_statistics, "_MOST_BYTES", most)
        quantized = qc.quantize_groups(captured, quant, calibration=[(x,)])
        made.append(qc.insert_adapters(quantized, adapter, source=captured, calibration=[(x,)]))
    assert made[0].plan == made[1].plan
    for one, other in zip(made[0].tensors().values(), made[1].tensors().values(), strict=True):
        assert torch.equal(one, other)
    assert max(len(part) for part in collected[:2]) == 3
    assert max(len(part) for part in collected[2:]) == 1


def test_calls_are_checked_at_once() -> None:
    x = torch.randn(3, 16)
    with pytest.raises(UserInputError, match="no calibration data"):
        StatisticsInParts(annotated(MLP(16, 4), x), [])
