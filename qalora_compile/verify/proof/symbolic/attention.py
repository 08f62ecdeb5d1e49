"""Attention, rotary embeddings and layer norms, in the operators that they consist of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from qalora_compile.verify.proof.symbolic.arithmetic import quotient
from qalora_compile.verify.proof.symbolic.expression import (
    INFINITE,
    Expr,
    add,
    function,
    inverse,
    linear,
    mul,
    number,
    where,
)
from qalora_compile.verify.proof.symbolic.operators import (
    arange,
    at_most,
    choice,
    difference,
    floating,
    product,
    total,
)
from qalora_compile.verify.proof.symbolic.polynomial import Poly, as_poly
from qalora_compile.verify.proof.symbolic.sums import matmul, mean, softmax
from qalora_compile.verify.proof.symbolic.tensor import (
    BOOL,
    FLOAT,
    ONE_ELEMENT,
    Index,
    Tensor,
    UnprovableError,
    concatenate,
    cut,
    elementwise,
    reshape,
    scalar,
    transpose,
)


def layer_norm(value: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Expr) -> Tensor:
    """(x - mean) / √(variance + eps), times a weight, plus a bias."""
    centered = difference(value, mean(value, -1, kept=True))
    variance = mean(product(centered, centered), -1, kept=True)
    scale = elementwise(lambda v: inverse(function("sqrt", add(v, eps))), FLOAT, variance)
    found = product(centered, scale)
    found = found if weight is None else product(found, weight)
    return found if bias is None else total(found, bias)


def gelu(value: Tensor, approximate: str) -> Tensor:
    """0.5 x (1 + erf(x √0.5)), or with the approximation by tanh."""
    if approximate == "none":
        inner = elementwise(
            lambda x: function("erf", mul(number(math.sqrt(0.5)), x)), FLOAT, floating(value)
        )
    elif approximate == "tanh":
        inner = elementwise(
            lambda x: function(
                "tanh",
                mul(number(math.sqrt(2 / math.pi)), add(x, mul(number(0.044715), x, x, x))),
            ),
            FLOAT,
            floating(value),
        )
    else:
        raise UnprovableError(f"gelu by {approximate}")
    return elementwise(lambda x, y: mul(number(0.5), x, add(number(1), y)), FLOAT, value, inner)


def split_heads(value: Tensor, heads: int) -> Tensor:
    """`[B, S, H · D]` as `[B, H, S, D]`."""
    if value.rank != 3:
        raise UnprovableError("heads of a tensor without three axes")
    shape = (*value.shape[:2], as_poly(heads), as_poly(-1))
    return transpose(reshape(value, shape), (0, 2, 1, 3))


def join_heads(value: Tensor) -> Tensor:
    """Undo `split_heads`."""
    lead = (value.shape[0], value.shape[2])
    return reshape(transpose(value, (0, 2, 1, 3)), (*lead, value.shape[1] * value.shape[3]))


def repeated(value: Tensor, heads: Poly) -> Tensor:
    """`[B, Hk, T, D]` with each head repeated, so that there are `heads`."""
    have, need = value.shape[1].constant, heads.constant
    if have == need and have is not None:
        return value
    if have is None or need is None or need % have:
        raise UnprovableError("the number of heads is no multiple of those of the keys")
    ratio = as_poly(need // have)

    def element(index: Index) -> Expr:
        return value[(index[0], quotient(index[1], ratio), *index[2:])]

    return Tensor((value.shape[0], heads, *value.shape[2:]), value.dtype, element)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: Expr,
    *,
    causal: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V of `[B, H, S, D]`, `[B, Hk, T, D]` and `[B, Hk, T, Dv]`."""
    if (q.rank, k.rank, v.rank) != (4, 4, 4):
        raise UnprovableError("attention of tensors without four axes")
    keys, values = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    scores = matmul(q, transpose(keys, (0, 1, 3, 2)))
    scores = elementwise(lambda s: mul(scale, s), FLOAT, scores)
    if softcap:
        limit = number(softcap)
        scores = elementwise(
            lambda s: mul(limit, function("tanh", mul(s, inverse(limit)))), FLOAT, scores
        )
    if causal:
        if q.shape[2] is not k.shape[2]:
            raise UnprovableError("causal attention with a past")
        rows, columns = (arange(as_poly(0), q.shape[2]) for _ in range(2))
        below = at_most(
            reshape(columns, (ONE_ELEMENT, q.shape[2])), reshape(rows, (q.shape[2], ONE_ELEMENT))
        )
        scores = masked(scores, below)
    if mask is not None:
        scores = masked(scores, mask)
    return matmul(softmax(scores, -1), values)


def scale_of(scale: float | None, width: Poly) -> Expr:
    """The scale of the products; 1 / √D by default."""
    if scale is not None:
        return number(scale)
    if width.constant is None:
        raise UnprovableError("it has no known scale")
    return number(float(width.constant**-0.5))


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores where a boolean mask is true and -∞ elsewhere, or plus a mask of floats."""
    if mask.dtype != BOOL:
        found = total(scores, mask)
    else:
        found = choice(mask, scores, scalar(number(-INFINITE), FLOAT))
    if found.shape != scores.shape:
        raise UnprovableError("a mask with more elements than there are scores")
    return found


def rotated(value: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """`[B, S, H, D]` rotated by `[B, S, R / 2]`: halves, or neighbours, against each other."""
    if cos.rank != 3 or cos.shape != sin.shape or cos.shape[2].constant is None:
        raise UnprovableError("tables of a rotary embedding without three axes")
    half = cos.shape[2]
    rotated_width = half * 2
    c, s = (Tensor((*t.shape[:2], ONE_ELEMENT, half), FLOAT, _without_head(t)) for t in (cos, sin))
    step = 2 if interleaved else 1
    starts = (as_poly(0), as_poly(1)) if interleaved else (as_poly(0), half)
    ends = (rotated_width, rotated_width) if interleaved else (half, rotated_width)
    one, other = (cut(value, -1, *b, step) for b in zip(starts, ends, strict=True))
    real, imaginary = (
        difference(product(one, c), product(other, s)),
        total(product(other, c), product(one, s)),
    )
    if interleaved:
        pair = Tensor(
            (*real.shape[:3], rotated_width),
            FLOAT,
            lambda i: where(
                linear(quotient(i[3], as_poly(2)) * 2 - i[3]),
                real[(*i[:3], quotient(i[3], as_poly(2)))],
                imaginary[(*i[:3], quotient(i[3], as_poly(2)))],
            ),
        )
        parts = [pair]
    else:
        parts = [real, imaginary]
    if value.shape[-1] is not rotated_width:
        parts.append(cut(value, -1, rotated_width, None))
    return concatenate(parts, -1)


def _without_head(value: Tensor) -> Callable[[Index], Expr]:
    return lambda index: value[(index[0], index[1], index[3])]


def with_past(
    a: Mapping[str, Any], heads: int, kv_heads: int, scale: float | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of `[B, S, H · D]` or `[B, H, S, D]`; with all keys and values, past ones first."""
    q, k, v = a["q"], a["k"], a["v"]
    apart = q.rank == k.rank == v.rank == 4
    if not apart:
        q, k, v = split_heads(q, heads), split_heads(k, kv_heads), split_heads(v, kv_heads)
    if a.get("past_key") is not None and a.get("past_value") is not None:
        k, v = concatenate([a["past_key"], k], 2), concatenate([a["past_value"], v], 2)
    found = attention(q, k, v, a.get("mask"), scale_of(scale, q.shape[-1]), **options)
    return found if apart else join_heads(found), k, v
