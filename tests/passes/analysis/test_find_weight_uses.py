"""Readings of a weight through views, the names of their rows, and paths that stay apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qalora_compile as qc
from qalora_compile.ir.site_plan import KEEP, QUANTIZE, SitePlan
from tests.models import adapted, scale_of, worst

Body = Callable[[Tensor, Tensor], Tensor]


class Reads(nn.Module):
    """One weight `[rows, 32]`, read by a given expression."""

    def __init__(self, rows: int, body: Body) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 32))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """The expression."""
        return self.body(x, self.weight)


def plan_of(model: nn.Module, x: Tensor, **options: Any) -> SitePlan:
    return qc.quantize_groups(qc.capture_model(model.eval(), (x,)), **options).plan


READINGS: dict[str, Body] = {
    "linear": functional.linear,
    "t": lambda x, w: x @ w.t(),
    "T": lambda x, w: x @ w.T,
    "mT": lambda x, w: x @ w.mT,
    "transpose": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "permute": lambda x, w: torch.mm(x, w.permute(1, 0)),
    "view": lambda x, w: functional.linear(x, w.view(24, 32)),
    "reshape": lambda x, w: functional.linear(x, w.reshape(2, 12, 32).flatten(0, 1)),
    "unsqueeze": lambda x, w: functional.linear(x, w[None].squeeze(0)),
    "select": lambda x, w: functional.linear(x, w.view(2, 12, 32)[1]),
    "slice": lambda x, w: functional.linear(x, w[4:20]),
    "columns": lambda x, w: functional.linear(x[:, :16], w[:, 8:24]),
    "narrow": lambda x, w: functional.linear(x, w.narrow(0, 2, 10)),
    "split": lambda x, w: functional.linear(x, w.split(6)[2]),
    "chunk": lambda x, w: functional.linear(x, w.chunk(3)[0]),
    "unbind": lambda x, w: functional.linear(x, w.view(3, 8, 32).unbind(0)[1]),
    "addmm": lambda x, w: torch.addmm(torch.ones(24), x, w.t()),
}


@pytest.mark.parametrize("name", READINGS)
def test_a_reading_through_views_is_quantized_and_folds(name: str) -> None:
    torch.manual_seed(0)
    model, x = Reads(24, READINGS[name]), torch.randn(5, 32)
    program = adapted(model, (x,), qc.QuantSpec(group_size=8))
    (site,) = program.plan.to_quantize()
    assert site.kind in ("linear", "matmul", "addmm")
    assert worst(program(x), qc.fold_adapters(program)(x)) <= 1e-5 * scale_of(program(x))
    # 8 bits stay close to the model itself: the right elements were read, in the right orientation.
    close = qc.quantize_groups(qc.capture_model(model, (x,)), qc.QuantSpec(bits=8, group_size=8))
    assert worst(close(x), model(x)) < 0.02 * scale_of(model(x))


OTHERS: dict[str, tuple[Body, str]] = {
    "left": (lambda x, w: w @ x.t(), "multiplies by it from the left"),
    "embedding": (lambda x, w: functional.embedding(x.long() * 0, w), "table of an embedding"),
    "returned": (lambda x, w: w, "returned as it is"),
    "pointwise": (lambda x, w: x[:1] * w, "read by mul, which is not a linear map"),
    "input": (lambda x, w: functional.linear(w, x), "as its input or bias"),
    "copied": (lambda x, w: functional.linear(x, w.t().reshape(24, 32)), "copy in another layout"),
    "indexed": (lambda x, w: functional.linear(x, w[torch.tensor([0, 2])]), "not a linear map"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_use_is_kept_with_its_reason(name: str) -> None:
    body, reason = OTHERS[name]

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.fc = Reads(24, body), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.odd(x), self.fc(x)

    plan = plan_of(Beside(), torch.randn(5, 32))
    (row,) = [site for site in plan if site.weight == "odd.weight"]
    assert row.decision == KEEP and reason in row.reason, row.reason


def test_parts_of_a_packed_weight_are_named_by_their_place() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        a, b = w.split([16, 8])
        return functional.linear(x, a).sum(-1, keepdim=True) + functional.linear(x, b)

    plan = plan_of(Reads(24, body), torch.randn(5, 32))
    assert [(s.name.rpartition(".")[2], s.n, s.decision) for s in plan] == [
        ("from_0", 16, QUANTIZE),
        ("from_512", 8, QUANTIZE),
    ]


def test_parts_that_overlap_are_kept() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        return functional.linear(x, w[:12]) + functional.linear(x, w[6:18])

    plan = plan_of(Reads(24, body), torch.randn(5, 32))
    first, second = plan
    assert (first.decision, second.decision) == (QUANTIZE, KEEP)
    assert f"reads a part of the weight of {first.name}" in second.reason


@pytest.mark.parametrize(
    ("cross", "parts"),
    [(False, ["in_proj"]), (True, ["in_proj.q", "in_proj.kv"])],
    ids=["self", "cross"],
)
def test_packed_attention_is_named_by_its_projections(cross: bool, parts: list[str]) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            other = torch.tanh(x) if cross else x
            y: Tensor = self.attn(x, other, other, need_weights=False)[0]
            return y

    plan = plan_of(Attention(), torch.randn(2, 5, 32))
    names = [site.name for site in plan.to_quantize()]
    assert names == [*(f"attn.{part}" for part in parts), "attn.out_proj"]


class SamePath(nn.Module):
    """Three weights whose tensors would all go below the path `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.fc.scale = nn.Parameter(torch.ones(32))
        self.fc_weight = nn.Parameter(torch.randn(32, 32))
        self.fc_quantized = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        """All of them, one after another."""
        y = self.fc(x) * self.fc.scale
        z: Tensor = self.fc_quantized(functional.linear(y, self.fc_weight))
        return z


def test_weights_of_one_path_stay_apart() -> None:
    torch.manual_seed(0)
    model, x = SamePath(), torch.randn(5, 32)
    spec = qc.QuantSpec(bits=8, group_size=16)
    program = adapted(model, (x,), spec)
    sites = program.plan.to_quantize()
    assert len({site.path for site in sites}) == len(sites) == 3
    assert torch.equal(program.tensors()["fc.scale"], torch.ones(32))
    close = qc.quantize_groups(qc.capture_model(model, (x,)), spec)
    assert worst(close(x), model(x)) < 0.02 * scale_of(model(x))
    assert worst(program(x), qc.fold_adapters(program)(x)) <= 1e-5 * scale_of(program(x))


class Router(nn.Module):
    """Scores ranked by topk; a second layer may read the same weight."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.gate, self.other = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)
        if shared:
            self.other.weight = self.gate.weight

    def forward(self, x: Tensor) -> Tensor:
        """Outputs at the best two scores."""
        best = self.gate(x).softmax(-1).topk(2).indices
        return self.other(x).gather(-1, best)


def test_a_router_is_kept_unless_it_is_named() -> None:
    x = torch.randn(5, 32)
    plan = plan_of(Router(shared=False), x)
    assert plan["gate"].decision == KEEP and "ranked by topk" in plan["gate"].reason
    assert plan["other"].decision == QUANTIZE
    forced = plan_of(Router(shared=False), x, targets=["gate"])
    assert forced["gate"].decision == QUANTIZE


def test_another_use_of_a_routers_weight_is_kept_too() -> None:
    with pytest.raises(qc.QaloraError, match="no linear layer to quantize") as info:
        plan_of(Router(shared=True), torch.randn(5, 32))
    assert str(info.value).count("ranked by topk") == 2


def test_a_weight_that_nothing_reads_has_a_row() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.spare = nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y

    plan = plan_of(Unread(), torch.randn(5, 32))
    assert plan["spare"].decision == KEEP
    assert "does not read it" in plan["spare"].reason
