"""What is traced once for all models of one structure is what each of them would give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from tests.captures import Memo
from tests.models import (
    MLP,
    TRANSFORMERS,
    TiedHead,
    capture_transformer,
    llama,
    slow,
    token_ids,
    worst,
)


class Shifted(nn.Module):
    """A layer, and tensors that are no parameters: a buffer, a plain attribute, a constant."""

    def __init__(self, shift: float = 1.0) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("scale", torch.rand(8), persistent=False)
        self.shift = torch.full((8,), shift)

    def forward(self, x: Tensor) -> Tensor:
        """Use them all."""
        return self.fc(x) * self.scale + self.shift + torch.tensor(2.0)


@pytest.fixture
def memo(captures: Memo, monkeypatch: pytest.MonkeyPatch) -> Memo:
    """One for the test alone: what other tests have traced is not in it."""
    fresh = captures.fresh()
    monkeypatch.setattr(torch.export, "export", fresh)
    return fresh


def hits(memo: Memo, *models: nn.Module, args: tuple[Tensor, ...]) -> int:
    """How many traces were used again while models were captured."""
    before = memo.hits
    for model in models:
        qc.capture_model(model, args)
    return memo.hits - before


@pytest.mark.parametrize("name", ["llama", *slow("bert", "gpt2")])
def test_a_remembered_trace_is_a_fresh_one(name: str, memo: Memo) -> None:
    ids = token_ids(2, 16)
    qc.capture_model(TRANSFORMERS[name](), (ids,))
    model, before = TRANSFORMERS[name](), memo.hits
    found = qc.capture_model(model, (ids,))
    assert memo.hits > before
    with memo.off():
        fresh = qc.capture_model(model, (ids,))
    assert str(found) == str(fresh)
    assert found.signature == fresh.signature
    assert found.notes == fresh.notes
    tensors, wanted = found.tensors(), fresh.tensors()
    assert list(tensors) == list(wanted)
    weights = dict(model.named_parameters(remove_duplicate=False))
    assert all(tensors[n] is wanted[n] for n in tensors if n in weights)
    other = token_ids(3, 11)
    assert worst(found(other), model(other)) == worst(fresh(other), model(other)) <= 1e-6


def test_every_kind_of_tensor_is_that_of_the_model(memo: Memo) -> None:
    x = torch.randn(3, 8)
    models = Shifted(), Shifted()
    assert hits(memo, *models, args=(x,)) == 1
    for model in models:
        assert worst(qc.capture_model(model, (x,))(x), model(x)) == 0.0


@pytest.mark.slow
def test_other_structures_are_traced_anew(memo: Memo) -> None:
    x = torch.randn(3, 8)
    assert hits(memo, Shifted(1.0), Shifted(3.0), args=(x,)) == 0
    frozen = MLP(8, 8)
    frozen.layers[0].requires_grad_(False)
    models = MLP(8, 8), MLP(8, 8, 8), MLP(8, 8, bias=False), MLP(8, 8).double(), frozen
    for model in models:
        like = x.double() if next(model.parameters()).dtype == torch.float64 else x
        assert hits(memo, model, args=(like,)) == 0
    assert hits(memo, MLP(8, 8), args=(torch.randn(3, 5, 8),)) == 0
    untied = TiedHead()
    untied.lm_head.weight = nn.Parameter(untied.embed.weight.detach().clone())
    assert hits(memo, TiedHead(), untied, args=(torch.ones(2, 4, dtype=torch.long),)) == 0
    ids = (token_ids(2, 16),)
    assert hits(memo, llama(rope_theta=5e3), llama(rope_theta=6e3), args=ids) == 0


def test_what_a_test_replaces_is_traced(memo: Memo, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 8)
    hits(memo, MLP(8, 4), args=(x,))
    with monkeypatch.context() as patch:
        patch.setattr(MLP, "forward", lambda self, x: self.layers[0](x) + 1)
        model = MLP(8, 4)
        assert worst(qc.capture_model(model, (x,))(x), model(x)) == 0.0
    hooked = MLP(8, 4)
    hooked.register_forward_hook(lambda *_: _[-1] * 2)
    assert worst(qc.capture_model(hooked, (x,))(x), hooked(x)) == 0.0
    assert hits(memo, MLP(8, 4), args=(x,)) == 1


@pytest.mark.slow
def test_classes_that_are_made_anew_are_compared(memo: Memo) -> None:
    """As the package makes one for a model with its cache."""
    model = llama()
    qc.add_kv_cache(qc.quantize_groups(capture_transformer(model)), model)
    other, before = llama(), memo.hits
    found = qc.add_kv_cache(qc.quantize_groups(capture_transformer(other)), other)
    assert memo.hits == before + 2
    with memo.off():
        fresh = qc.add_kv_cache(qc.quantize_groups(capture_transformer(other)), other)
    assert str(found) == str(fresh)
    assert found.signature == fresh.signature

    def scaled(by: float) -> nn.Module:
        class Scaled(MLP):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * by

        return Scaled(8, 3)

    x = torch.randn(3, 8)
    assert hits(memo, scaled(2.0), scaled(3.0), args=(x,)) == 0
    assert hits(memo, scaled(2.0), args=(x,)) == 1
    model = scaled(3.0)
    assert worst(qc.capture_model(model, (x,))(x), model(x)) == 0.0
