"""What ONNX's operators mean as functions of indices, by the standard's definitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

from qalora_compile.verify.proof.graphs.read_onnx import ONNX_TYPES
from qalora_compile.verify.proof.symbolic import attention, onnx_ordering, onnx_spatial, sums
from qalora_compile.verify.proof.symbolic import operators as o
from qalora_compile.verify.proof.symbolic import tensor as t
from qalora_compile.verify.proof.symbolic.arithmetic import holds
from qalora_compile.verify.proof.symbolic.expression import (
    as_integer,
    exponential,
    index_of,
    integer,
    inverse,
    is_nan,
    number,
)
from qalora_compile.verify.proof.symbolic.polynomial import Poly, as_poly
from qalora_compile.verify.proof.symbolic.tensor import Tensor, TooShortError, UnprovableError

Inputs = Sequence[Any]
Options = Mapping[str, Any]
Meaning = Callable[[Inputs, Options], Any]
_ONNX: dict[str, tuple[int, frozenset[str], Meaning]] = {}
_UNARY = ("Sqrt", "Log", "Tanh", "Sigmoid", "Relu", "Erf", "Sin", "Cos")


def means(op: str, most: int, *options: str, domain: str = "onnx") -> Callable[[Meaning], Meaning]:
    """Declare the meaning of an operator with up to `most` operands and these attributes."""

    def declare(meaning: Meaning) -> Meaning:
        _ONNX[f"{domain}.{op}"] = (most, frozenset(options), meaning)
        return meaning

    return declare


def onnx_value(op: str, args: Inputs, options: Options) -> Any:
    """The value of a node, from its operands; a tuple if it has several results.

    Raises:
        UnprovableError: the operator, an operand, or an attribute has no meaning here.
    """
    if op not in _ONNX:
        raise UnprovableError("it has no symbolic form")
    most, known, meaning = _ONNX[op]
    if len([a for a in args if a is not None]) > most:
        raise UnprovableError(f"it has {len(args)} operands")
    unknown = options.keys() - known
    if unknown:
        raise UnprovableError(f"its attribute {sorted(unknown)[0]} is not known")
    return meaning([*args, *[None] * (most - len(args))], options)


def _simple(op: str, most: int, make: Callable[..., Tensor]) -> None:
    means(op, most)(lambda x, _: make(*x))


def _typed(op: str, make: Callable[..., Tensor]) -> None:
    """An operator whose two operands have one type, as ONNX demands."""
    means(op, 2)(lambda x, _: make(*_of_one_type(*x)))


def _of_one_type(*values: Tensor) -> Sequence[Tensor]:
    if len({value.dtype for value in values}) != 1:
        raise UnprovableError("its operands have different types")
    return values


def _unary(name: str) -> Callable[[Tensor], Tensor]:
    function = o.unary(name)
    return lambda value: function(t.only_floats(value))


for _op in _UNARY:
    _simple(_op, 1, _unary(_op.lower()))
_simple("Abs", 1, o.absolute)
_simple("Exp", 1, lambda x: t.elementwise(exponential, t.FLOAT, t.only_floats(x)))
_typed("Add", o.total)
_typed("Sub", o.difference)
_typed("Mul", o.product)
_simple("Neg", 1, lambda x: o.scaled(x, -1))
_simple("Reciprocal", 1, lambda x: t.elementwise(inverse, t.FLOAT, t.only_floats(x)))
_simple("Pow", 2, lambda x, y: o.power(t.only_floats(x), y))
_simple("Identity", 1, lambda x: x)
_typed("LessOrEqual", o.at_most)
_typed("GreaterOrEqual", lambda x, y: o.at_most(y, x))
_typed("Less", o.less)
_typed("Greater", lambda x, y: o.less(y, x))
_typed("Equal", o.same)
_typed("And", o.conjunction)
_typed("Or", o.alternative)
_simple("Not", 1, o.complement)
_simple("IsNaN", 1, lambda x: t.elementwise(is_nan, t.BOOL, t.only_floats(x)))
_simple("Where", 3, lambda c, x, y: o.choice(c, *_of_one_type(x, y)))
_typed("MatMul", sums.matmul)
_simple("Expand", 2, lambda x, shape: t.expand(x, tuple(t.integers(shape))))
_simple("Unsqueeze", 2, lambda x, axes: t.unsqueeze(x, _numbers(axes)))


def _extreme(op: str, choose: Callable[..., Tensor]) -> None:
    """The largest or smallest of any number of operands."""
    means(op, 99)(lambda x, _: reduce(choose, _of_one_type(*(v for v in x if v is not None))))


_extreme("Max", o.larger)
_extreme("Min", o.smaller)


@means("Clip", 3)
def _clip(x: Inputs, _: Options) -> Tensor:
    _of_one_type(*(operand for operand in x if operand is not None))
    value, least, most = x
    return o.clamped(value, least, most)


def _numbers(value: Tensor) -> list[int]:
    """A vector of known integers."""
    found = [place.constant for place in t.integers(value)]
    if None in found:
        raise UnprovableError("axes are not known")
    return [number for number in found if number is not None]


@means("Div", 2)
def _div(x: Inputs, _: Options) -> Tensor:
    one, other = _of_one_type(*x)
    if one.dtype == t.FLOAT:
        return o.divided(one, other)

    def element(a: Any) -> Any:
        top = as_integer(a)
        if top is not None and not holds(top):
            raise TooShortError(f"a division of {top.name}, which may be negative")
        return a

    return o.floor_divided(t.elementwise(element, t.INT, one), other)


@means("Cast", 1, "to", "saturate")
def _cast(x: Inputs, options: Options) -> Tensor:
    return o.cast(x[0], ONNX_TYPES.get(int(options["to"])))


@means("CastLike", 2, "saturate")
def _cast_like(x: Inputs, _: Options) -> Tensor:
    return o.cast(x[0], x[1].dtype)


@means("Shape", 1, "start", "end")
def _shape(x: Inputs, options: Options) -> Tensor:
    return t.sizes(x[0].shape[options.get("start", 0) : options.get("end")])


@means("ConstantOfShape", 1, "value")
def _constant_of_shape(x: Inputs, options: Options) -> Tensor:
    return t.expand(o.literal(options.get("value", 0.0)), tuple(t.integers(x[0])))


@means("Squeeze", 2)
def _squeeze(x: Inputs, _: Options) -> Tensor:
    return t.squeeze(x[0], None if x[1] is None else _numbers(x[1]))


@means("Range", 3)
def _range(x: Inputs, _: Options) -> Tensor:
    start, end, step = (index_of(value[()]) for value in x)
    if step.constant != 1:
        raise UnprovableError("a range with a step")
    if not holds(end - start):
        raise UnprovableError("the length of a range may be negative")
    return o.arange(start, end)


@means("Slice", 5)
def _slice(x: Inputs, _: Options) -> Tensor:
    value: Tensor = x[0]
    _, starts, ends, axes, steps = x
    first, last = t.integers(starts), t.integers(ends)
    along = list(range(len(first))) if axes is None else _numbers(axes)
    strides = [1] * len(first) if steps is None else _numbers(steps)
    for axis, begin, end, step in zip(along, first, last, strides, strict=True):
        value = t.cut(value, axis, begin, end, step)
    return value


def _equal_parts(size: Poly, options: Options) -> Tensor:
    count, known = options.get("num_outputs"), size.constant
    if not count or known is None or known % count:
        raise UnprovableError("the parts of a split have no sizes")
    return t.sizes([as_poly(known // count)] * count)


@means("Split", 2, "axis", "num_outputs")
def _split(x: Inputs, options: Options) -> tuple[Tensor, ...]:
    value, axis = x[0], options.get("axis", 0)
    lengths = _equal_parts(value.shape[value.axis(axis)], options) if x[1] is None else x[1]
    places = [as_poly(0)]
    for length in t.integers(lengths):
        places.append(places[-1] + length)
    if places[-1] is not value.shape[value.axis(axis)]:
        raise UnprovableError("the parts of a split do not add up to its axis")
    return tuple(t.cut(value, axis, first, last) for first, last in pairwise(places))


@means("Concat", 99, "axis")
def _concat(x: Inputs, options: Options) -> Tensor:
    values = _of_one_type(*(value for value in x if value is not None))
    return t.concatenate(values, options["axis"])


@means("Transpose", 1, "perm")
def _transpose(x: Inputs, options: Options) -> Tensor:
    return t.transpose(x[0], options.get("perm", range(x[0].rank)[::-1]))


@means("Reshape", 2, "allowzero")
def _reshape(x: Inputs, options: Options) -> Tensor:
    value, target = x[0], t.integers(x[1])
    if not options.get("allowzero", 0):
        target = [value.shape[i] if size.constant == 0 else size for i, size in enumerate(target)]
    return t.reshape(value, target)


@means("Gather", 2, "axis")
def _gather(x: Inputs, options: Options) -> Tensor:
    return t.gather(x[0], options.get("axis", 0), x[1])


@means("GatherElements", 2, "axis")
def _gather_elements(x: Inputs, options: Options) -> Tensor:
    return t.gather_elements(x[0], options.get("axis", 0), x[1])


@means("GatherND", 2, "batch_dims")
def _gather_nd(x: Inputs, options: Options) -> Tensor:
    value, places = x
    width = places.shape[-1].constant
    if options.get("batch_dims", 0) or width is None:
        raise UnprovableError("it has axes of a batch")
    one = [t.gather(places, -1, t.scalar(integer(i), t.INT)) for i in range(width)]
    return o.lookup(value, one)


@means("Mod", 2, "fmod")
def _mod(x: Inputs, options: Options) -> Tensor:
    one, other = _of_one_type(*x)
    if one.dtype != t.INT or options.get("fmod", 0):
        raise UnprovableError("a remainder of floats")
    whole = o.floor_divided(one, other)
    return o.difference(one, o.product(whole, other))


@means("ReduceMean", 2, "axes", "keepdims", "noop_with_empty_axes")
def _mean(x: Inputs, options: Options) -> Tensor:
    return _reduced(x, options, sums.mean)


@means("ReduceSum", 2, "axes", "keepdims", "noop_with_empty_axes")
def _sum(x: Inputs, options: Options) -> Tensor:
    return _reduced(x, options, sums.total)


def _reduced(x: Inputs, options: Options, over: Callable[..., Tensor]) -> Tensor:
    axes = _numbers(x[1]) if x[1] is not None else list(options.get("axes", ()))
    kept = bool(options.get("keepdims", 1))
    return sums.reduced_over(o.floating(x[0]), axes, over, kept=kept)


@means("ReduceL2", 2, "axes", "keepdims", "noop_with_empty_axes")
def _length(x: Inputs, options: Options) -> Tensor:
    squares = o.product(t.only_floats(x[0]), x[0])
    return o.unary("sqrt")(_reduced([squares, x[1]], options, sums.total))


@means("CumSum", 2, "exclusive", "reverse")
def _cumsum(x: Inputs, options: Options) -> Tensor:
    if options.get("exclusive", 0) or options.get("reverse", 0):
        raise UnprovableError("it sums in another order")
    return sums.cumulated(o.floating(x[0]), *_numbers(x[1]))


@means("Gelu", 1, "approximate")
def _gelu(x: Inputs, options: Options) -> Tensor:
    return attention.gelu(x[0], options.get("approximate", "none"))


@means("Flatten", 1, "axis")
def _flatten(x: Inputs, options: Options) -> Tensor:
    axis = options.get("axis", 1)
    axis = axis if axis == x[0].rank else x[0].axis(axis)
    parts = (t.product_of(x[0].shape[:axis]), t.product_of(x[0].shape[axis:]))
    return t.reshape(x[0], parts)


@means("Gemm", 3, "alpha", "beta", "transA", "transB")
def _gemm(x: Inputs, options: Options) -> Tensor:
    if any(options.get(name, 1.0) != 1 for name in ("alpha", "beta")):
        raise UnprovableError("it has factors")
    names = ("transA", "transB")
    pairs = zip(x[:2], names, strict=True)
    one, other = (t.transpose(v, (1, 0)) if options.get(n, 0) else v for v, n in pairs)
    found = sums.matmul(one, other)
    return found if x[2] is None else o.total(found, x[2])


@means("Softmax", 1, "axis")
def _softmax(x: Inputs, options: Options) -> Tensor:
    return sums.softmax(x[0], options.get("axis", -1))


def _check_norm(x: Inputs, options: Options) -> None:
    if options.get("axis", -1) not in (-1, x[0].rank - 1) or options.get("stash_type", 1) != 1:
        raise UnprovableError("a norm over several axes, or in another precision")


@means("RMSNormalization", 2, "axis", "epsilon", "stash_type")
def _rms_norm(x: Inputs, options: Options) -> Tensor:
    _check_norm(x, options)
    return sums.rms_norm(x[0], x[1], number(options.get("epsilon", 1e-5)))


@means("LayerNormalization", 3, "axis", "epsilon", "stash_type")
def _layer_norm(x: Inputs, options: Options) -> Tensor:
    _check_norm(x, options)
    return attention.layer_norm(x[0], x[1], x[2], number(options.get("epsilon", 1e-5)))


@means("RotaryEmbedding", 4, "interleaved", "num_heads", "rotary_embedding_dim")
def _rotary(x: Inputs, options: Options) -> Tensor:
    value, cos, sin, places = x
    if value.rank == 3:
        heads = as_poly(options["num_heads"])
        each = t.reshape(value, (*value.shape[:2], heads, as_poly(-1)))
    else:
        each = t.transpose(value, (0, 2, 1, 3))
    if places is not None:
        cos, sin = (t.gather(table, 0, places) for table in (cos, sin))
    rotated_width = cos.shape[-1] * 2
    if as_poly(options.get("rotary_embedding_dim", 0) or each.shape[-1]) is not rotated_width:
        raise UnprovableError("the tables do not have half the rotated size")
    found = attention.rotated(each, cos, sin, interleaved=bool(options.get("interleaved", 0)))
    if value.rank == 3:
        return t.reshape(found, value.shape)
    return t.transpose(found, (0, 2, 1, 3))


_ATTENTION = (
    *("is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode"),
    *("scale", "softcap", "softmax_precision"),
)


@means("Attention", 6, *_ATTENTION)
def _attention(x: Inputs, options: Options) -> tuple[Tensor, ...]:
    q, *_, past_key, past_value = x
    if options.get("qk_matmul_output_mode", 0) or options.get("softmax_precision", 1) != 1:
        raise UnprovableError("an attribute of it has no meaning here")
    if (past_key is None) != (past_value is None):
        raise UnprovableError("it has only one of past keys and values")
    counts = [options.get(name) for name in ("q_num_heads", "kv_num_heads")]
    if q.rank == 4:
        stated = [None if n is None else as_poly(n) for n in counts]
        if any(n not in (None, v.shape[1]) for n, v in zip(stated, x, strict=False)):
            raise UnprovableError("it states another number of heads than its operands have")
    elif q.rank != 3 or None in counts:
        raise UnprovableError("attention of tensors without three or four axes")
    heads, kv_heads = (n or 0 for n in counts)
    names = ("q", "k", "v", "mask", "past_key", "past_value")
    return attention.with_past(
        dict(zip(names, x, strict=True)),
        heads,
        kv_heads,
        options.get("scale"),
        causal=bool(options.get("is_causal", 0)),
        softcap=options.get("softcap", 0.0),
    )


onnx_ordering.declare(means)
onnx_spatial.declare(means)
