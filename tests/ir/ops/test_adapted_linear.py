"""A layer on codes and its adapter in one operator: values, gradients, what backward keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.ir.affine import group_count
from qalora_compile.ir.ops import adapted_linear, linear
from tests.ir.ops.test_linear import linear_arguments

Q = torch.ops.qalora
FLOATS = (0, 4, 5, 6)
"""Places of the arguments that have gradients."""


def adapted_arguments(
    shape: tuple[int, ...],
    n: int,
    bits: int,
    group_size: int,
    *,
    pool: int | None = None,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
) -> tuple[Any, ...]:
    """Arguments of adapted_linear; the adapter has rank 2."""
    *linear, bits, _ = linear_arguments(shape, n, bits, group_size, dtype, bias=bias)
    pool = pool or group_size
    lora = (
        torch.randn(*size, dtype=dtype, requires_grad=True)
        for size in ((2, group_count(shape[-1], pool)), (n, 2))
    )
    return (*linear, *lora, bits, group_size, pool, 0.75)


def separate(*arguments: Any) -> Tensor:
    """The three operators that it stands for."""
    x, *weight, lora_a, lora_b, bits, group_size, pool, scaling = arguments
    pooled = Q.group_sum(x, pool)
    base: Tensor = Q.group_linear(x, *weight, bits, group_size)
    return base + Q.pooled_adapter(pooled, lora_a, lora_b, scaling)


CHECKED = {
    "tail": adapted_arguments((2, 3, 20), 5, 4, 8, dtype=torch.float32),
    "3 bits, no bias": adapted_arguments((4, 11), 5, 3, 4, dtype=torch.float32, bias=False),
    "wider pool": adapted_arguments((4, 22), 5, 4, 4, pool=12, dtype=torch.float32),
    "vector": adapted_arguments((12,), 3, 2, 4, dtype=torch.float32),
    "float64": adapted_arguments((3, 20), 5, 4, 8),
}


@pytest.mark.parametrize("kind", CHECKED)
def test_opcheck(kind: str) -> None:
    results = torch.library.opcheck(Q.adapted_linear.default, CHECKED[kind])
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_the_gradient() -> None:
    _, *weight, _, lora_a, lora_b, bits, g, pool, scaling = CHECKED["tail"]
    tensors = (t.detach() for t in (*weight, lora_a, lora_b))
    arguments = (torch.randn(2, 5), *tensors, bits, g, pool, scaling, 20)
    results = torch.library.opcheck(Q.adapted_linear_input_grad.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("k", "g", "pool"), [(20, 8, 8), (7, 16, 16), (13, 2, 6), (1, 1, 1)])
def test_gradients(k: int, g: int, pool: int) -> None:
    arguments = adapted_arguments((3, k), 4, 4, g, pool=pool)
    assert torch.autograd.gradcheck(
        lambda *given: Q.adapted_linear(*given)[0], arguments, atol=1e-7
    )


@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    k=st.integers(1, 24),
    g=st.integers(1, 9),
    factor=st.integers(1, 3),
    bits=st.sampled_from((2, 3, 4, 8)),
)
@settings(max_examples=25, deadline=None)
def test_it_is_the_layer_and_its_adapter(
    lead: list[int], k: int, g: int, factor: int, bits: int
) -> None:
    arguments = adapted_arguments((*lead, k), 5, bits, g, pool=factor * g)
    mine, theirs = Q.adapted_linear(*arguments)[0], separate(*arguments)
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-10)
    floats = [arguments[i] for i in FLOATS]
    upstream = torch.randn_like(theirs)
    for ours, other in zip(
        torch.autograd.grad(mine, floats, upstream),
        torch.autograd.grad(theirs, floats, upstream),
        strict=True,
    ):
        assert ours.shape == other.shape
        assert torch.allclose(ours, other, rtol=0, atol=1e-10)


def test_backward_keeps_sums_not_inputs() -> None:
    arguments = adapted_arguments((3, 20), 5, 4, 8)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, pooled = Q.adapted_linear(*arguments)
    assert {t.data_ptr() for t in kept} == {
        t.data_ptr() for t in (*arguments[1:4], *arguments[5:7], pooled)
    }
    assert not pooled.requires_grad
    y.sum().backward()
    assert arguments[0].grad is not None


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = adapted_arguments((3, 20), 7, 4, 8)
    floats = [arguments[i] for i in FLOATS]
    full = Q.adapted_linear(*arguments)[0]
    grads = torch.autograd.grad(full.sum(), floats)
    monkeypatch.setattr(linear, "_TILE_ELEMENTS", {"cpu": 40})
    x, qweight, scale, offset = arguments[:4]
    tiles = list(linear.weight_tiles(x, qweight, scale, offset, 4, 8, 20))
    assert [weight.shape for _, weight in tiles] == [(2, 20)] * 3 + [(1, 20)]
    tiled = Q.adapted_linear(*arguments)[0]
    assert torch.allclose(tiled, full, rtol=0, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(tiled.sum(), floats), grads, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


def test_it_compiles_into_one_graph() -> None:
    arguments = adapted_arguments((3, 20), 5, 4, 8, dtype=torch.float32)
    floats = [arguments[i] for i in FLOATS]

    def step(*given: Any) -> Tensor:
        return torch.tanh(Q.adapted_linear(*given)[0]).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    mine, theirs = compiled(*arguments), step(*arguments)
    assert torch.allclose(mine, theirs)
    for ours, other in zip(
        torch.autograd.grad(mine, floats), torch.autograd.grad(theirs, floats), strict=True
    ):
        assert torch.allclose(ours, other)


def test_a_gradient_that_drops_the_adapter_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = adapted_arguments((3, 20), 4, 4, 8)
    y = Q.adapted_linear(*arguments)[0]
    monkeypatch.setattr(adapted_linear, "folded_offset", lambda offset, *_: offset)
    mine = torch.autograd.grad(y.sum(), arguments[0])[0]
    theirs = torch.autograd.grad(separate(*arguments).sum(), arguments[0])[0]
    assert not torch.allclose(mine, theirs, rtol=0, atol=1e-3)


def test_what_it_gives_can_be_written_into() -> None:
    """Llama 4 multiplies queries in place; of a view, torch could not train that."""
    arguments = adapted_arguments((2, 3, 20), 5, 4, 8)
    y = Q.adapted_linear(*arguments)[0]
    y.mul_(2)
    (twice,) = torch.autograd.grad(y.sum(), [arguments[5]])
    (once,) = torch.autograd.grad(Q.adapted_linear(*arguments)[0].sum(), [arguments[5]])
    assert torch.allclose(twice, 2 * once)
