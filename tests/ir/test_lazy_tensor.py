"""Deferred tensors: shapes now, values later, each made once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qalora_compile.errors import InternalError
from qalora_compile.ir import lazy_tensor as deferred_module
from qalora_compile.ir.lazy_tensor import (
    Seen,
    defer,
    holds,
    is_lazy,
    keep_recipe,
    make_lazy,
    materialize,
    materialize_parts,
)


class Source:
    """Gives a tensor and counts how often."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.values

    def defer(self) -> Tensor:
        """The values, deferred."""
        return make_lazy(self, self.values.to("meta"), FakeTensorMode(allow_non_fake_inputs=True))


def halves(x: Tensor) -> dict[str, Tensor]:
    return {"low": x[:2] * 2, "high": x[2:].double()}


def test_real_tensors_are_computed_at_once() -> None:
    found = defer(halves, torch.arange(4.0))
    assert not any(map(is_lazy, found.values()))
    assert found["low"].tolist() == [0, 2]


def test_values_come_when_they_are_asked_for() -> None:
    source = Source(torch.arange(4.0))
    x = source.defer()
    found = defer(halves, x)
    assert all(map(is_lazy, [x, *found.values()]))
    assert (found["high"].dtype, found["high"].shape) == (torch.float64, (2,))
    assert source.calls == 0
    assert materialize(found["low"]).tolist() == [0, 2]
    assert materialize(found["high"]).tolist() == [2, 3]
    assert source.calls == 1
    materialize(found["low"])  # again: computed again, not kept
    assert source.calls == 2


def test_shapes_that_were_seen_are_not_computed_again() -> None:
    calls = []

    def compute(x: Tensor) -> dict[str, Tensor]:
        calls.append(x)
        return {"y": x.double().t()}

    seen: Seen = {}
    sources = [Source(torch.full((2, 3), float(i))) for i in range(2)]
    for i, source in enumerate(sources):
        found = defer(compute, source.defer(), seen=seen, key="a")["y"]
        assert (found.shape, found.dtype, found.stride()) == ((3, 2), torch.float64, (1, 3))
        assert len(calls) == 1 + i  # once for the shapes, then only for values
        assert materialize(found).unique().tolist() == [i]
    defer(compute, sources[0].defer(), seen=seen, key="b")
    defer(compute, Source(torch.ones(4, 4)).defer(), seen=seen, key="a")
    assert len(seen) == 3


def test_recipes_chain_and_mix_with_real_tensors() -> None:
    source = Source(torch.arange(4.0))
    first = defer(halves, source.defer())["low"]
    second = defer(lambda a, b: {"sum": a + b}, first, torch.ones(2))["sum"]
    assert materialize(second).tolist() == [1, 3]


def test_a_parameter_made_of_one_keeps_its_recipe() -> None:
    x = Source(torch.arange(4.0)).defer()
    parameter = keep_recipe(x, torch.nn.Parameter(x, requires_grad=False))
    assert materialize(parameter).tolist() == [0, 1, 2, 3]


def test_conditions_on_unknown_values_are_not_known() -> None:
    x = Source(torch.arange(4.0)).defer()
    assert holds((x > 9).all())
    assert not holds((x > 9).all(), unknown=False)
    assert not holds((torch.ones(2) > 9).all())


def test_a_tensor_without_a_recipe_is_a_bug() -> None:
    with FakeTensorMode():
        empty = torch.empty(3)
    with pytest.raises(InternalError, match="never given values"):
        materialize(empty)


def test_values_of_another_shape_are_a_bug() -> None:
    mode = FakeTensorMode()
    wrong = make_lazy(lambda: torch.ones(5), torch.empty(3, device="meta"), mode)
    with pytest.raises(InternalError, match=r"\[3\]"):
        materialize(wrong)


class Rows(Source):
    """A source that can be read by rows, and says how many it gave at a time."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self.read: list[tuple[int, int]] = []

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows."""
        self.read.append((start, stop))
        return self.values[start:stop]

    def defer(self) -> Tensor:
        """The values, deferred."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        return make_lazy(self, self.values.to("meta"), mode, self.rows)


def split_rows(x: Tensor) -> dict[str, Tensor]:
    return {"wide": torch.cat([x, -x], 1), "sums": x.sum(1, keepdim=True)}


@pytest.fixture
def parts_of_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_module, "_PART_ELEMENTS", 16)


def test_rows_are_made_some_at_a_time(parts_of_two_rows: None) -> None:
    source = Rows(torch.arange(20.0).view(5, 4))
    made = defer(split_rows, source.defer(), by_rows=True)
    more = defer(lambda wide: {"": wide * 2}, made["wide"], by_rows=True)[""]
    parts = list(materialize_parts(more))
    assert source.read == [(0, 2), (2, 4), (4, 5)]
    assert source.calls == 0, "nothing was read at once"
    assert torch.equal(torch.cat(parts), 2 * split_rows(source.values)["wide"])


def test_small_tensors_are_kept_while_a_large_one_is_made(parts_of_two_rows: None) -> None:
    source = Rows(torch.arange(20.0).view(5, 4))
    made = defer(split_rows, source.defer(), by_rows=True)
    torch.cat(list(materialize_parts(made["wide"])))
    (sums,) = materialize_parts(made["sums"])
    assert len(source.read) == 3
    assert torch.equal(sums, source.values.sum(1, keepdim=True))
    list(materialize_parts(made["sums"]))  # taken: computed again
    assert len(source.read) > 3


def test_what_is_not_by_rows_is_computed_at_once(parts_of_two_rows: None) -> None:
    source = Rows(torch.arange(20.0).view(5, 4))
    transposed = defer(lambda x: {"": x.T.contiguous()}, source.defer())[""]
    (complete,) = materialize_parts(transposed)
    assert torch.equal(complete, source.values.T)
    assert source.read == []
    plain = torch.ones(3)
    assert next(materialize_parts(plain)) is plain


def test_rows_of_another_shape_are_a_bug(parts_of_two_rows: None) -> None:
    wrong = Rows(torch.ones(5, 3))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensor = make_lazy(wrong, torch.empty(5, 4, device="meta"), mode, wrong.rows)
    with pytest.raises(InternalError, match=r"\[5, 4\]"):
        list(materialize_parts(tensor))
    short = make_lazy(wrong, torch.empty(6, 3, device="meta"), mode, wrong.rows)
    with pytest.raises(InternalError, match=r"\[6, 3\]"):
        list(materialize_parts(short))
