"""What ONNX Runtime's operators (`com.microsoft`), and our own, mean as functions of indices.

Written from their documentation (ContribOperators.md of ONNX Runtime, docs/reference/operators.md)
and tested against what the runtime computes. Operands and attributes that are not named here are
refused.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from qalora_compile.verify.proof.graphs.stored_tensor import StoredTensor, from_array
from qalora_compile.verify.proof.symbolic import attention, sums
from qalora_compile.verify.proof.symbolic import operators as o
from qalora_compile.verify.proof.symbolic import tensor as t
from qalora_compile.verify.proof.symbolic.arithmetic import holds, quotient
from qalora_compile.verify.proof.symbolic.expression import (
    add,
    both,
    function,
    index_of,
    integer,
    linear,
    mul,
    number,
)
from qalora_compile.verify.proof.symbolic.onnx_operators import Inputs, Options, means
from qalora_compile.verify.proof.symbolic.polynomial import Poly, as_poly, of_atom, variable
from qalora_compile.verify.proof.symbolic.tensor import ONE_ELEMENT, Tensor, UnprovableError
from qalora_compile.verify.proof.weights.unpack import flat_codes, from_bits

_DOMAIN = "com.microsoft"


def _needed(condition: bool, why: str) -> None:
    if not condition:
        raise UnprovableError(why)


def _absent(values: Inputs, what: str) -> None:
    _needed(all(value is None for value in values), f"{what} has no meaning here")


@means("SimplifiedLayerNormalization", 2, "axis", "epsilon", "stash_type")
def _simplified_norm(x: Inputs, options: Options) -> Tensor:
    value, scale = x
    last = options.get("axis", -1) in (-1, value.rank - 1)
    _needed(last and options.get("stash_type", 1) == 1, "a norm over several axes")
    return sums.rms_norm(value, scale, number(options.get("epsilon", 1e-5)))


@means("SkipSimplifiedLayerNormalization", 4, "epsilon", domain=_DOMAIN)
def _skip_simplified(x: Inputs, options: Options) -> tuple[Any, ...]:
    value, skip, scale, bias = x
    joined = _joined(value, skip, bias)
    found = sums.rms_norm(joined, scale, number(options.get("epsilon", 1e-12)))
    return found, None, None, joined


@means("SkipLayerNormalization", 5, "epsilon", domain=_DOMAIN)
def _skip_norm(x: Inputs, options: Options) -> tuple[Any, ...]:
    value, skip, scale, shift, bias = x
    joined = _joined(value, skip, bias)
    eps = number(options.get("epsilon", 1e-12))
    return attention.layer_norm(joined, scale, shift, eps), None, None, joined


def _joined(value: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    found = o.total(value, skip)
    _needed(found.shape == value.shape, "a residual with more elements than its value")
    return found if bias is None else o.total(found, bias)


@means("Gelu", 1, domain=_DOMAIN)
def _gelu(x: Inputs, _: Options) -> Tensor:
    return attention.gelu(x[0], "none")


@means("BiasGelu", 2, domain=_DOMAIN)
def _bias_gelu(x: Inputs, _: Options) -> Tensor:
    return attention.gelu(o.total(*x), "none")


@means("FastGelu", 2, domain=_DOMAIN)
def _fast_gelu(x: Inputs, _: Options) -> Tensor:
    value, bias = x
    return attention.gelu(value if bias is None else o.total(value, bias), "tanh")


@means("QuickGelu", 1, "alpha", domain=_DOMAIN)
def _quick_gelu(x: Inputs, options: Options) -> Tensor:
    alpha = number(options.get("alpha", 1.702))
    return t.elementwise(lambda v: mul(v, function("sigmoid", mul(alpha, v))), t.FLOAT, x[0])


_SWAPS = ("transA", "transB")


@means("FusedMatMul", 2, "alpha", *_SWAPS, "transBatchA", "transBatchB", domain=_DOMAIN)
def _fused_matmul(x: Inputs, options: Options) -> Tensor:
    _needed(not any(options.get(f"transBatch{n}", 0) for n in "AB"), "a transposed batch")
    pairs = zip(x, _SWAPS, strict=True)
    one, other = (_turned(value) if options.get(name, 0) else value for value, name in pairs)
    alpha = number(options.get("alpha", 1.0))
    return t.elementwise(lambda v: mul(alpha, v), t.FLOAT, sums.matmul(one, other))


def _turned(value: Tensor) -> Tensor:
    *lead, row, column = range(value.rank)
    return t.transpose(value, (*lead, column, row))


@means(
    "RotaryEmbedding",
    4,
    *("interleaved", "num_heads", "rotary_embedding_dim", "is_packed_batching", "scale"),
    domain=_DOMAIN,
)
def _rotary(x: Inputs, options: Options) -> Tensor:
    value, places, cos, sin = x
    _needed(
        not options.get("is_packed_batching", 0) and options.get("scale", 1.0) == 1,
        "packed or scaled rotation",
    )
    width = options.get("rotary_embedding_dim", 0)
    if value.rank == 3:
        heads = options.get("num_heads", 0)
        size = cos.shape[1].constant
        _needed(bool(heads) or (not width and size is not None), "the number of heads")
        each = as_poly(-1) if heads else as_poly(2 * (size or 0))
        count = as_poly(heads) if heads else as_poly(-1)
        split = t.reshape(value, (*value.shape[:2], count, each))
    else:
        split = t.transpose(value, (0, 2, 1, 3))
    found = _turning(split, places, cos, sin, bool(options.get("interleaved", 0)), width)
    return t.reshape(found, value.shape) if value.rank == 3 else t.transpose(found, (0, 2, 1, 3))


def _turning(
    value: Tensor, places: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, width: int = 0
) -> Tensor:
    """`[B, S, H, D]` rotated by the rows of the tables at positions `[B, S]`, or from `[1]` on."""
    size = cos.shape[1] * 2
    _needed(
        as_poly(width or 0) is size if width else size is value.shape[3],
        "the tables do not have half the rotated size",
    )
    if places.rank == 1:
        start = index_of(places[(as_poly(0),)])
        places = t.expand(o.arange(start, start + value.shape[1]), value.shape[:2])
    _needed(places.shape == value.shape[:2], "positions of another shape")
    rows = [t.gather(table, 0, places) for table in (cos, sin)]
    return attention.rotated(value, *rows, interleaved=interleaved)


_MHA = ("num_heads", "scale", "mask_filter_value", "unidirectional")


@means("MultiHeadAttention", 10, *_MHA, domain=_DOMAIN)
def _multi_head(x: Inputs, options: Options) -> tuple[Any, ...]:
    q, k, v, bias, padding, added, past_key, past_value, *rest = x
    _absent((padding, *rest), "a mask of padding, or a buffer, of MultiHeadAttention")
    _needed(k is not None and v is not None and k.rank == v.rank == 3, "packed keys and values")
    _needed((past_key is None) == (past_value is None), "only one of past keys and values")
    causal = bool(options.get("unidirectional", 0))
    if bias is not None:
        ends = [as_poly(0)]
        for one in (q, k, v):
            ends.append(ends[-1] + one.shape[2])
        _needed(bias.shape[0] is ends[-1], "a bias of another size")
        parts = [t.cut(bias, 0, a, b) for a, b in pairwise(ends)]
        q, k, v = (o.total(one, part) for one, part in zip((q, k, v), parts, strict=True))
    given = {"q": q, "k": k, "v": v, "past_key": past_key, "past_value": past_value}
    heads = options["num_heads"]
    scale = options.get("scale", 0.0) or None
    if added is not None:
        _needed(added.rank == 4, "an attention bias without four axes")
        given["mask"] = added
    return attention.with_past(given, heads, heads, scale, causal=causal)


_GQA = (
    *("num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary"),
    *("rotary_interleaved", "smooth_softmax", "qk_output", "k_quant_type", "v_quant_type"),
    "kv_cache_bit_width",
)


@means("GroupQueryAttention", 14, *_GQA, domain=_DOMAIN)
def _group_query(x: Inputs, options: Options) -> tuple[Any, ...]:
    """Keys of the past and those up to the query's own position, as the lengths say.

    Raises:
        UnprovableError: lengths are not known to be those of all keys: a batch with padding.
    """
    q, k, v, past_key, past_value, lengths, total, cos, sin, places, added, *rest = x
    _absent((added, *rest), "a bias of attention, a sink, or a scale of a quantized cache")
    off = ("smooth_softmax", "qk_output", "kv_cache_bit_width")
    kinds = {options.get(name, "NONE") for name in ("k_quant_type", "v_quant_type")}
    _needed(kinds == {"NONE"} and options.get("smooth_softmax", 0) <= 0, "an attribute of it")
    _needed(all(options.get(name, 0) in (0, -1) for name in off), "an attribute of it")
    heads, kv_heads = options["num_heads"], options["kv_num_heads"]
    q, k, v = _unpacked(q, k, v, heads, kv_heads)
    _needed((past_key is None) == (past_value is None), "only one of past keys and values")
    past = as_poly(0) if past_key is None else past_key.shape[2]
    every = past + q.shape[1]
    first, *others = (t.place_of(v[_somewhere(v)]) for v in (lengths, total))
    _needed(
        first is every - 1 and others == [every],
        "lengths that are not known to be those of all keys: rows with padding",
    )
    q, k, v = (_by_heads(one, n) for one, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if options.get("do_rotary", 0):
        if places is None:
            places = t.expand(o.arange(past, every), q.shape[:2])
        turned = bool(options.get("rotary_interleaved", 0))
        q, k = (_turning(one, places, cos, sin, turned) for one in (q, k))
    q, k, v = (t.transpose(one, (0, 2, 1, 3)) for one in (q, k, v))
    if past_key is not None:
        k, v = t.concatenate([past_key, k], 2), t.concatenate([past_value, v], 2)
    window = options.get("local_window_size", -1)
    _needed(window == -1 or window > 0, f"a window of {window}")
    mask = _below(past, q.shape[2], window)
    scale = attention.scale_of(options.get("scale", 0.0) or None, q.shape[3])
    found = attention.attention(q, k, v, mask, scale, softcap=options.get("softcap", 0.0))
    return attention.join_heads(found), k, v


def _by_heads(value: Tensor, heads: int) -> Tensor:
    """`[B, S, H · D]` as `[B, S, H, D]`."""
    return t.reshape(value, (*value.shape[:2], as_poly(heads), as_poly(-1)))


def _somewhere(value: Tensor) -> t.Index:
    """A generic index."""
    pairs = enumerate(value.shape)
    return tuple(
        as_poly(0) if s is ONE_ELEMENT else of_atom(variable(f"g{i}", s)) for i, s in pairs
    )


@means("CachedAttention", 6, "q_num_heads", "kv_num_heads", "scale", domain="qalora")
def _cached(x: Inputs, options: Options) -> tuple[Tensor, ...]:
    """By docs/reference/operators.md, for files without the function that exports carry for it."""
    _needed(None not in x, "an operand is missing")
    given = dict(zip(("q", "k", "v", "mask", "past_key", "past_value"), x, strict=True))
    heads = (options["q_num_heads"], options["kv_num_heads"])
    return attention.with_past(given, *heads, options["scale"])


def _unpacked(q: Tensor, k: Any, v: Any, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    if k is not None and v is not None:
        return q, k, v
    _needed(k is None and v is None, "keys without values")
    width = q.shape[2].constant or 0
    size = width // (heads + 2 * kv_heads)
    _needed(size * (heads + 2 * kv_heads) == width, "packed queries of another size")
    ends = [as_poly(n * size) for n in (0, heads, heads + kv_heads, heads + 2 * kv_heads)]
    one, two, three = (t.cut(q, 2, a, b) for a, b in pairwise(ends))
    return one, two, three


def _below(past: Poly, count: Poly, window: int) -> Tensor:
    """`[1, 1, S, T]`: key j is not after query i, and among the last `window` ones before it."""

    def element(index: t.Index) -> Any:
        here, key = past + index[2], index[3]
        allowed = linear(here - key)
        return allowed if window < 0 else both(allowed, linear(key + window - here - 1))

    return Tensor((ONE_ELEMENT, ONE_ELEMENT, count, past + count), t.BOOL, element)


def _codes_of(value: Tensor, bits: int, count: int) -> StoredTensor:
    """Codes in bytes, low bits first, along the last axis."""
    stored = _source(value)
    codes = from_bits(stored.read(), bits, count).astype(np.float32)
    return from_array(stored.name, codes)


def _source(value: Tensor) -> StoredTensor:
    if value.stored is None:
        raise UnprovableError("codes that are computed")
    return value.stored


@means(
    "MatMulNBits",
    6,
    *("K", "N", "bits", "block_size", "accuracy_level", "weight_prepacked"),
    domain=_DOMAIN,
)
def _nbits(x: Inputs, options: Options) -> Tensor:
    """X · Wᵀ with W = scale · (code − zero-point); zero-points are 2^(bits − 1) by default."""
    value, packed, scale, zero, order, bias = x
    _absent((order,), "an order of columns")
    _needed(not options.get("weight_prepacked", 0), "prepacked weights")
    k, n = int(options["K"]), int(options["N"])
    bits, block = int(options.get("bits", 4)), int(options["block_size"])
    blocks = -(-k // block)
    shape = (n, blocks, block * bits // 8)
    _needed(_source(packed).shape == shape, "codes of another shape")
    flat = StoredTensor("", "uint8", (n, blocks * shape[2]), lambda: _bytes(packed, n))
    codes = o.stored(_codes_of(o.stored(flat), bits, blocks * block))
    steps = t.reshape(scale, (as_poly(n), as_poly(blocks)))
    zeros = _zeros(zero, bits, n, blocks)
    weight = _dequantized(codes, steps, zeros, 1, block)
    weight = t.cut(weight, 1, as_poly(0), as_poly(k))
    found = sums.matmul(value, _turned(weight))
    return found if bias is None else o.total(found, bias)


def _bytes(packed: Tensor, rows: int) -> Any:
    return _source(packed).read().reshape(rows, -1)


def _zeros(zero: Tensor | None, bits: int, rows: int, blocks: int) -> Tensor:
    """Zero-points `[N, blocks]`: packed like the codes, or as numbers."""
    if zero is None:
        middle = o.literal(float(2 ** (bits - 1)))
        return t.expand(middle, (as_poly(rows), as_poly(blocks)))
    if _source(zero).dtype != "uint8":
        return t.reshape(zero, (as_poly(rows), as_poly(blocks)))
    flat = StoredTensor("", "uint8", (rows, -(-blocks * bits // 8)), lambda: _bytes(zero, rows))
    return o.stored(_codes_of(o.stored(flat), bits, blocks))


def _dequantized(codes: Tensor, steps: Tensor, zeros: Tensor, axis: int, block: int) -> Tensor:
    """(code − zero-point) · scale, one of these for each block along an axis."""

    def element(index: t.Index) -> Any:
        place = quotient(index[axis], as_poly(block))
        group = (*index[:axis], place, *index[axis + 1 :])
        return mul(steps[group], add(codes[index], mul(integer(-1), zeros[group])))

    return Tensor(codes.shape, t.FLOAT, element)


@means(
    "GatherBlockQuantized",
    4,
    *("bits", "block_size", "gather_axis", "quantize_axis"),
    domain=_DOMAIN,
)
def _gather_codes(x: Inputs, options: Options) -> Tensor:
    """Rows of a quantized table; bytes hold two codes of 4 bits, and the zero-point is then 8."""
    table, places, scale, zero = x
    bits, block = int(options.get("bits", 4)), int(options.get("block_size", 128))
    stored = _source(table)
    axis = table.axis(options.get("quantize_axis", 1))
    _needed(options.get("gather_axis", 0) == 0 and table.rank == 2 and axis == 1, "its axes")
    rows = stored.shape[0]
    blocks = int(scale.shape[1].constant or 0)
    if stored.dtype == "uint8":
        count = stored.shape[1] * 8 // bits
        codes = o.stored(_codes_of(table, bits, count))
        zeros = _zeros(zero, bits, rows, blocks)
    else:
        _needed(stored.dtype == "uint4" and bits == 4, f"codes of type {stored.dtype}")
        count = stored.shape[1]
        codes = o.stored(_wide(stored, bits))
        zeros = (
            t.expand(o.literal(0.0), (as_poly(rows), as_poly(blocks)))
            if zero is None
            else o.stored(_wide(_source(zero), bits))
        )
    _needed(blocks == -(-count // block) and holds(as_poly(blocks)), "scales of another shape")
    return t.gather(_dequantized(codes, scale, zeros, 1, block), 0, places)


def _wide(stored: StoredTensor, bits: int) -> StoredTensor:
    codes = flat_codes(stored.read(), bits, stored.shape)
    return from_array(stored.name, codes.astype(np.float32))
