"""sort-columns: the same function, its columns in the order of their groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qalora_compile as qc
from qalora_compile.errors import PostconditionError, QaloraError
from qalora_compile.passes.sort_columns import SortColumns
from tests.models import MLP, UsedTwice, gpt2, token_ids, worst

Golden = Callable[[str, str], None]


def annotated(model: torch.nn.Module, *args: Tensor) -> qc.Program:
    captured = qc.capture_model(model.eval(), args)
    return qc.Pipeline.parse("annotate-linears")(captured).program


def order_of(k: int, seed: int = 0) -> Tensor:
    return torch.randperm(k, generator=torch.Generator().manual_seed(seed))


def test_golden(golden: Golden) -> None:
    program = annotated(UsedTwice(), torch.randn(2, 32))
    path = program.plan.to_quantize()[0].path
    step = SortColumns(owners=(f"{path}={path}",), orders={path: order_of(32)})
    golden("sort-columns", str(step(program).program))


@settings(max_examples=12)
@given(widths=st.lists(st.integers(1, 12), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_the_function_stays_the_same(widths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model, x = MLP(*widths).double(), torch.randn(3, widths[0], dtype=torch.float64)
    program = annotated(model, x)
    orders = {s.path: order_of(s.k, seed) for s in program.plan.to_quantize()}
    step = SortColumns(owners=tuple(f"{p}={p}" for p in orders), orders=orders)
    result = step(program)
    assert worst(result.program(x), model(x)) <= 1e-12
    for site in result.program.plan.to_quantize():
        before = program.tensors()[site.weight]
        assert torch.equal(result.program.tensors()[site.weight], before[:, orders[site.path]])
    assert {change.path for change in result.changes} == set(orders)
    text = ",".join(result.program.history[-1:])
    assert qc.Pipeline.parse(text).passes[0] == step


# Faults


@pytest.mark.parametrize("fault", ["inverse", "weight alone"])
def test_a_wrong_order_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qalora_compile.passes import sort_columns

    x = torch.randn(5, 16)
    program = annotated(MLP(16, 8), x)
    (site,) = program.plan.to_quantize()
    real = sort_columns._sorted

    def wrong(weight: Tensor, order: Tensor | None) -> dict[str, Tensor]:
        made = real(weight, order)
        swapped = torch.argsort(made["order"]) if fault == "inverse" else torch.arange(16)
        return made | {"order": swapped}

    monkeypatch.setattr(sort_columns, "_sorted", wrong)
    step = SortColumns(owners=(f"{site.path}={site.path}",), orders={site.path: order_of(16)})
    report = qc.verify_equivalence(
        program, step(program).program, [(x,)], qc.Tolerance(max_abs=1e-5)
    )
    assert not report.passed


def test_a_selection_that_is_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from qalora_compile.passes import sort_columns

    program = annotated(MLP(16, 8), torch.randn(5, 16))
    (site,) = program.plan.to_quantize()
    monkeypatch.setattr(sort_columns, "_rewrite", lambda *_: None)
    step = SortColumns(owners=(f"{site.path}={site.path}",), orders={site.path: order_of(16)})
    with pytest.raises(PostconditionError, match="not sorted"):
        step(program)


@pytest.mark.parametrize(
    ("owners", "order", "words"),
    [
        (("layers.9=layers.9",), order_of(16), "not a quantized weight"),
        (("layers.0",), order_of(16), "owners holds"),
        (("layers.0=layers.0",), order_of(15), "no order for the columns"),
        (("layers.0=layers.0",), torch.zeros(16, dtype=torch.int64), "no order for the columns"),
        (("layers.0=layers.0",), None, "no order for the columns"),
    ],
)
def test_what_is_no_order_is_refused(
    owners: tuple[str, ...], order: Tensor | None, words: str
) -> None:
    program = annotated(MLP(16, 8), torch.randn(2, 16))
    with pytest.raises(QaloraError, match=words):
        SortColumns(owners=owners, orders=None if order is None else {"layers.0": order})(program)


def test_a_weight_that_is_no_linear_layers_is_refused() -> None:
    program = annotated(gpt2(), token_ids(2, 16))
    site = next(site for site in program.plan.to_quantize() if site.kind != "linear")
    step = SortColumns(owners=(f"{site.path}={site.path}",), orders={site.path: order_of(site.k)})
    with pytest.raises(QaloraError, match="read through views"):
        step(program)
