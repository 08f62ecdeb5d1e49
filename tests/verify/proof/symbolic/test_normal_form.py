"""What normal forms make equal is equal in numbers too, and what is not equal stays so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from qalora_compile.verify.proof.graphs.graph import FX, Graph, Node, Ref
from qalora_compile.verify.proof.graphs.graph import Tensor as StoredName
from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor, from_array
from qalora_compile.verify.proof.symbolic import attention
from qalora_compile.verify.proof.symbolic import operators as o
from qalora_compile.verify.proof.symbolic.expression import (
    ZERO,
    Expr,
    add,
    exponential,
    function,
    inverse,
    is_nan,
    leaf,
    mul,
    number,
    where,
)
from qalora_compile.verify.proof.symbolic.fold_constants import FoldedConstants
from qalora_compile.verify.proof.symbolic.fx_operators import ATEN
from qalora_compile.verify.proof.symbolic.normalize import Normalizer
from qalora_compile.verify.proof.symbolic.onnx_operators import onnx_value
from qalora_compile.verify.proof.symbolic.operators import stored
from qalora_compile.verify.proof.symbolic.polynomial import as_poly, of_atom, size, variable
from qalora_compile.verify.proof.symbolic.tensor import Tensor, UnprovableError
from tests.verify.proof.symbolic.numbers import Numbers, array
from tests.verify.proof.symbolic.test_fx_operators import SIZES, given

_SIZES = [(size(n, least=least), count) for n, count in SIZES.items() for least in (0, 1)]
ATOMS = {atom: count for value, count in _SIZES for atom in value.atoms}
FACTORS = st.sampled_from([-3.0, -1.0, -0.35355338, 0.1, 0.25, 0.5, 1.0, 3.0, 7.0])


def form(value: Tensor) -> Expr:
    """The normal form of the element at a generic index."""
    index = (of_atom(variable(f"i{axis}", count)) for axis, count in enumerate(value.shape))
    return Normalizer().of(value[tuple(index)])


def scaled(value: Tensor, factor: float) -> Tensor:
    """A tensor times a number."""
    return o.product(value, o.literal(factor))


@drawn(st.lists(FACTORS, min_size=6, max_size=6))
@settings(max_examples=60, deadline=None)
def test_factors_that_leave_sums_change_no_number(factors: list[float]) -> None:
    torch.manual_seed(0)
    (x, real_x), (y, real_y) = given(("b", "s"), "x"), given(("b", "s"), "y")
    (which, real_which) = given(("b", "s", bool), "w")
    a, b, c, d, e, f = factors

    def made(one: Any, other: Any, choose: Any, times: Any, plus: Any) -> Any:
        left = times(plus(times(one, a), times(other, b)), c)
        return choose(left, times(plus(times(other, d), times(one, e)), f))

    value = made(x, y, lambda p, q: o.choice(which, o.product(p, p), q), scaled, o.total)
    wanted = made(
        real_x.double(),
        real_y.double(),
        lambda p, q: torch.where(real_which, p * p, q),
        lambda p, n: p * n,
        lambda p, q: p + q,
    ).sum(1)
    summed = ATEN.value("aten.sum.dim_IntList", [value, [1]], {})
    leaves = {"x": real_x.numpy(), "y": real_y.numpy(), "w": real_which.numpy()}
    found = array(summed, Numbers(leaves, ATOMS), normal=True)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_scores_may_be_scaled_before_or_behind_the_product() -> None:
    q, k, v = (given(("b", 2, "s", 4), name)[0] for name in "qkv")

    def scores(first: float, second: float, third: float) -> Expr:
        value = attention.attention(scaled(q, first), scaled(k, second), v, None, number(third))
        return form(value)

    assert scores(0.5, 0.5, 1.0) is scores(1.0, 1.0, 0.25) is scores(0.25, 1.0, 1.0)
    assert scores(0.5, 0.5, 1.0) is not scores(0.5, 0.5, 1.0000001)
    assert scores(0.5, 0.5, 1.0) is not scores(0.5, -0.5, 1.0)


@pytest.mark.parametrize("width", [4, 16, 32, 64, 80, 96, 128, 256])
def test_the_root_of_a_scale_may_stand_at_queries_and_keys(width: int) -> None:
    q, k, v = (given(("b", 2, "s", 4), name)[0] for name in "qkv")
    scale = number(width**-0.5)
    wanted = form(attention.attention(q, k, v, None, scale))
    exact = np.float32(width**-0.25)

    def found(one: Any, other: Any) -> Expr:
        factors = [stored(from_array("f", np.asarray(f, np.float32))) for f in (one, other)]
        first, second = (o.product(x, f) for x, f in zip((q, k), factors, strict=True))
        return form(attention.attention(first, second, v, None, number(1)))

    assert found(exact, exact) is wanted
    assert abs(float(exact) ** 2 - width**-0.5) < 2.0**-22 * width**-0.5
    assert found(exact, exact * np.float32(1 + 2.0**-21)) is not wanted
    assert found(exact * np.float32(1.001), exact * np.float32(1.001)) is not wanted
    assert found(exact, np.float32(1)) is not wanted


def test_only_exact_multiples_leave_a_sum() -> None:
    x, y = leaf("x", []), leaf("y", [])
    odd = add(mul(number(3.0), x), mul(number(1.0), y))
    assert mul(odd, odd).detail == (1.0, 2), "1 / 3 is no float32"
    even = add(mul(number(0.5), x), mul(number(-0.25), y))
    assert mul(even, even) is mul(number(0.25), *[add(x, mul(number(-0.5), y))] * 2)


def test_shares_of_a_softmax_are_numbers_and_other_values_may_be_none() -> None:
    x, _ = given(("b", "s"), "x")
    share = onnx_value("onnx.Softmax", [x], {})
    zero = o.literal(0.0)

    def guarded(value: Tensor, otherwise: Tensor) -> Tensor:
        which = onnx_value("onnx.IsNaN", [value], {})
        found: Tensor = onnx_value("onnx.Where", [which, zero, otherwise], {})
        return found

    assert form(guarded(share, share)) is form(share)
    assert form(guarded(x, x)) is not form(x)
    assert form(guarded(share, x)) is not form(x)
    root = o.unary("sqrt")(x)
    assert form(guarded(root, root)) is not form(root)
    quotient = mul(exponential(leaf("x", [])), inverse(leaf("y", [])))
    assert where(is_nan(quotient), ZERO, quotient) is not quotient
    assert where(is_nan(quotient), ZERO, quotient) is where(
        is_nan(quotient), ZERO, mul(function("exp", leaf("x", [])), inverse(leaf("y", [])))
    )


@pytest.mark.parametrize("known", [False, True], ids=["any positions", "positions in order"])
def test_masks_of_packed_positions_are_those_of_torch(known: bool) -> None:
    """As transformers computes them: a new sequence begins where positions do not go up by one."""
    real = torch.tensor([[0, 1, 2], [0, 0, 1]])
    positions = o.arange(as_poly(0), size("s", least=1)) if known else _positions()
    value = ATEN.value("aten.unsqueeze.default", [positions, 0], {}) if known else positions
    real = torch.arange(3)[None] if known else real
    first = o.difference(ATEN.value("aten.slice.Tensor", [value, 1, 0, 1], {}), o.literal(1))
    steps = ATEN.value("aten.diff.default", [value, 1, -1, first], {})
    packed = ATEN.value(
        "aten.cumsum.default", [ATEN.value("aten.ne.Scalar", [steps, 1], {}), -1], {}
    )
    rows, columns = (ATEN.value("aten.unsqueeze.default", [packed, axis], {}) for axis in (2, 1))
    mask = o.same(rows, columns)
    wanted = (torch.diff(real, prepend=real[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    numbers = Numbers({"positions": real.numpy()}, ATOMS)
    found = array(mask, numbers, normal=True)
    np.testing.assert_array_equal(found, wanted[:, :, None] == wanted[:, None, :])
    if known:
        assert form(mask).op == "true"


def _positions() -> Tensor:
    shape = (size("b"), size("s", least=1))
    return Tensor(shape, "int64", lambda index: leaf("positions", index))


@pytest.mark.parametrize("averaged", [False, True], ids=["each", "mean"])
def test_rows_at_counted_places_are_those_of_torch(averaged: bool) -> None:
    """Positions that count tokens, as RoBERTa has them, inside of a sum and outside."""
    torch.manual_seed(0)
    table, ids = torch.randn(5, 2), torch.tensor([[1, 4, 0], [3, 1, 2]])
    weight = Tensor((as_poly(5), as_poly(2)), "float32", lambda index: leaf("table", index))
    shape = (size("b"), size("s"))
    tokens = Tensor(shape, "int64", lambda index: leaf("ids", index))
    bits = o.cast(o.complement(o.same(tokens, o.literal(1))), "int32")
    places = o.product(o.cast(ATEN.value("aten.cumsum.default", [bits, 1], {}), "int32"), bits)
    value = ATEN.value("aten.embedding.default", [weight, o.total(places, o.literal(1))], {})
    kept = ids != 1
    wanted = table[kept.cumsum(1) * kept + 1]
    if averaged:
        weights = o.product(value, value)
        value = ATEN.value("aten.mean.dim", [weights, [1]], {})
        wanted = (wanted * wanted).mean(1)
    numbers = Numbers({"table": table.numpy(), "ids": ids.numpy()}, ATOMS)
    found = array(value, numbers, normal=True)
    np.testing.assert_allclose(found, wanted.double().numpy(), atol=1e-6)


def test_only_counts_and_small_numbers_fit_in_32_bits() -> None:
    ids = Tensor((size("b"),), "int64", lambda index: leaf("ids", index))
    with pytest.raises(UnprovableError, match="int32, which rounds or wraps"):
        form(o.cast(ids, "int32"))
    assert form(o.cast(ATEN.value("aten.full_like.default", [ids, 7], {}), "int32")) is number(7)
    with pytest.raises(UnprovableError, match="rounds or wraps"):
        form(o.cast(o.literal(0.5), "int32"))


def test_sums_of_stored_values_are_those_that_exports_hold() -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).numpy()
    kept = {"w": from_array("w", values), "h": from_array("h", values.astype(np.float16))}
    graph = Graph(FX, "", "", {}, {}, {}, kept, {}, {})
    folded = FoldedConstants(graph)

    def of(name: str, op: str, *args: Any, **options: Any) -> StoredTensor | None:
        return folded.of(Node(name, op, args, options, ""))

    widened = of("a", "aten.to.dtype", StoredName("w"), "float32")
    found = of("b", "aten.add.Tensor", Ref("a"), 1.0)
    assert widened is not None and found is not None
    wanted = torch.from_numpy(values) + 1.0
    assert found.digest == from_array("x", wanted.numpy()).digest
    assert of("c", "aten.add.Tensor", StoredName("h"), 1.0) is None, "float16 would round"
    assert of("d", "aten.add.Tensor", StoredName("w"), 0.1) is None, "0.1 is no float32"
    assert of("e", "aten.add.Tensor", StoredName("w"), 1.0, alpha=2) is None
    assert of("f", "aten.add.Tensor", Ref("unknown"), 1.0) is None
