"""What ATen's operators, and those of this package, mean as functions of indices."""

from __future__ import annotations

from functools import partial
from typing import Any

from qalora_compile.verify.proof.symbolic import attention, sums
from qalora_compile.verify.proof.symbolic import operators as o
from qalora_compile.verify.proof.symbolic import tensor as t
from qalora_compile.verify.proof.symbolic.expression import exponential, integer, inverse, number
from qalora_compile.verify.proof.symbolic.fx_layout import LAYOUT
from qalora_compile.verify.proof.symbolic.fx_ordering import ORDERING
from qalora_compile.verify.proof.symbolic.fx_spatial import SPATIAL
from qalora_compile.verify.proof.symbolic.operator_table import (
    Arguments,
    Meaning,
    OperatorTable,
    size_of,
    sizes_of,
    tensor_of,
)
from qalora_compile.verify.proof.symbolic.polynomial import Poly, as_poly
from qalora_compile.verify.proof.symbolic.tensor import Tensor, UnprovableError

ATEN = OperatorTable(LAYOUT | ORDERING | SPATIAL)
"""All operators with a meaning."""
_means = ATEN.means


def _unary(name: str) -> Meaning:
    function = o.unary(name)
    return lambda a: function(tensor_of(a["self"]))


for _name in ("sqrt", "log", "tanh", "sigmoid", "relu", "erf", "sin", "cos"):
    _means(f"aten.{_name}.default", "self")(_unary(_name))


@_means("aten.abs.default", "self")
def _abs(a: Arguments) -> Tensor:
    return o.absolute(tensor_of(a["self"]))


@_means("aten.exp.default", "self")
def _exp(a: Arguments) -> Tensor:
    return t.elementwise(exponential, t.FLOAT, o.floating(tensor_of(a["self"])))


@_means("aten.expm1.default", "self")
def _expm1(a: Arguments) -> Tensor:
    return o.difference(_exp(a), o.literal(1.0))


@_means("aten.square.default", "self")
def _square(a: Arguments) -> Tensor:
    return o.product(tensor_of(a["self"]), tensor_of(a["self"]))


@_means("aten.add.Tensor aten.add.Scalar _operator.add", "self other alpha")
def _add(a: Arguments) -> Tensor:
    if a.get("alpha", 1) != 1:
        raise UnprovableError("alpha is not 1")
    return o.total(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.sub.Tensor aten.sub.Scalar _operator.sub", "self other alpha")
def _sub(a: Arguments) -> Tensor:
    if a.get("alpha", 1) != 1:
        raise UnprovableError("alpha is not 1")
    return o.difference(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.rsub.Scalar aten.rsub.Tensor", "self other alpha")
def _rsub(a: Arguments) -> Tensor:
    found: Tensor = _sub({**a, "self": a["other"], "other": a["self"]})
    return found


@_means("aten.mul.Tensor aten.mul.Scalar _operator.mul aten.multiply.Tensor", "self other")
def _mul(a: Arguments) -> Tensor:
    return o.product(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.div.Tensor aten.div.Scalar", "self other")
def _div(a: Arguments) -> Tensor:
    return o.divided(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("_operator.floordiv aten.floor_divide.default", "self other")
def _floor_divide(a: Arguments) -> Tensor:
    return o.floor_divided(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.neg.default", "self")
def _neg(a: Arguments) -> Tensor:
    return o.scaled(tensor_of(a["self"]), -1)


@_means("aten.rsqrt.default", "self")
def _rsqrt(a: Arguments) -> Tensor:
    return o.power(tensor_of(a["self"]), o.literal(-0.5))


@_means("aten.reciprocal.default", "self")
def _reciprocal(a: Arguments) -> Tensor:
    return t.elementwise(inverse, t.FLOAT, o.floating(tensor_of(a["self"])))


@_means("aten.pow.Tensor_Scalar aten.pow.Tensor_Tensor", "self exponent")
def _pow(a: Arguments) -> Tensor:
    return o.power(tensor_of(a["self"]), tensor_of(a["exponent"]))


@_means("aten.silu.default", "self")
def _silu(a: Arguments) -> Tensor:
    return o.silu(tensor_of(a["self"]))


@_means("aten.le.Tensor aten.le.Scalar", "self other")
def _le(a: Arguments) -> Tensor:
    return o.at_most(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.ge.Tensor aten.ge.Scalar", "self other")
def _ge(a: Arguments) -> Tensor:
    return o.at_most(tensor_of(a["other"]), tensor_of(a["self"]))


@_means("aten.lt.Tensor aten.lt.Scalar", "self other")
def _lt(a: Arguments) -> Tensor:
    return o.less(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.gt.Tensor aten.gt.Scalar", "self other")
def _gt(a: Arguments) -> Tensor:
    return o.less(tensor_of(a["other"]), tensor_of(a["self"]))


@_means("aten.eq.Tensor aten.eq.Scalar", "self other")
def _eq(a: Arguments) -> Tensor:
    return o.same(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.ne.Tensor aten.ne.Scalar", "self other")
def _ne(a: Arguments) -> Tensor:
    return o.complement(o.same(tensor_of(a["self"]), tensor_of(a["other"])))


@_means("aten.__and__.Tensor aten.bitwise_and.Tensor aten.logical_and.default", "self other")
def _and(a: Arguments) -> Tensor:
    return o.conjunction(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.__or__.Tensor aten.bitwise_or.Tensor aten.logical_or.default", "self other")
def _or(a: Arguments) -> Tensor:
    return o.alternative(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.logical_not.default aten.bitwise_not.default", "self")
def _not(a: Arguments) -> Tensor:
    return o.complement(tensor_of(a["self"]))


@_means("aten.where.self aten.where.ScalarOther aten.where.ScalarSelf", "condition self other")
def _where(a: Arguments) -> Tensor:
    return o.choice(tensor_of(a["condition"]), tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.masked_fill.Scalar aten.masked_fill.Tensor", "self mask value")
def _masked_fill(a: Arguments) -> Tensor:
    value = tensor_of(a["self"])
    filled = o.choice(tensor_of(a["mask"]), tensor_of(a["value"]), value)
    if filled.shape != value.shape:
        raise UnprovableError("the mask has more elements")
    return Tensor(value.shape, value.dtype, lambda index: filled[index])


@_means("aten.minimum.default aten.min.other torch.sym_min", "self other")
def _minimum(a: Arguments) -> Tensor:
    return o.smaller(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.maximum.default aten.max.other torch.sym_max", "self other")
def _maximum(a: Arguments) -> Tensor:
    return o.larger(tensor_of(a["self"]), tensor_of(a["other"]))


@_means("aten.clamp.default aten.clamp.Tensor aten.clamp_min.default", "self min max")
def _clamp(a: Arguments) -> Tensor:
    least, most = (None if a.get(b) is None else tensor_of(a[b]) for b in ("min", "max"))
    return o.clamped(tensor_of(a["self"]), least, most)


@_means("aten.sym_size.int", "self dim")
def _sym_size(a: Arguments) -> Tensor:
    value = a["self"]
    return t.scalar(integer(value.shape[value.axis(a["dim"])]), t.INT)


@_means("aten.arange.default", "end dtype")
def _arange(a: Arguments) -> Tensor:
    return _range(as_poly(0), a["end"], a.get("dtype"))


@_means("aten.arange.start", "start end dtype")
def _arange_from(a: Arguments) -> Tensor:
    return _range(size_of(a["start"]), a["end"], a.get("dtype"))


def _range(start: Poly, end: Any, dtype: str | None) -> Tensor:
    if dtype not in (None, "int64") and not (dtype == "int32" and isinstance(end, int)):
        raise UnprovableError(f"positions of type {dtype}")
    return o.arange(start, size_of(end))


@_means("aten.new_ones.default", "self size dtype")
def _new_ones(a: Arguments) -> Tensor:
    return _full(a["size"], 1, a.get("dtype") or a["self"].dtype)


@_means("aten.full.default", "size fill_value dtype")
def _full_of(a: Arguments) -> Tensor:
    fill = a["fill_value"]
    usual = t.BOOL if isinstance(fill, bool) else t.INT if isinstance(fill, int) else t.FLOAT
    return _full(a["size"], fill, a.get("dtype") or usual)


@_means("aten.full_like.default", "self fill_value dtype")
def _full_like(a: Arguments) -> Tensor:
    return _filled_like(a["fill_value"], a)


def _full(size: Any, value: Any, dtype: str) -> Tensor:
    kind = o.kind_of(dtype)
    return Tensor(tuple(sizes_of(size)), kind, lambda _: o.element_of(value, kind))


def _filled(value: int, a: Arguments) -> Tensor:
    return _full(a["size"], value, a.get("dtype") or t.FLOAT)


def _filled_like(value: int, a: Arguments) -> Tensor:
    return _full(a["self"].shape, value, a.get("dtype") or a["self"].dtype)


for _name, _value in (("zeros", 0), ("ones", 1)):
    _means(f"aten.{_name}.default", "size dtype")(partial(_filled, _value))
    _means(f"aten.{_name}_like.default", "self dtype")(partial(_filled_like, _value))


@_means("aten.to.dtype aten.to.dtype_layout", "self dtype")
def _to(a: Arguments) -> Tensor:
    return _cast(a["self"], a.get("dtype"))


@_means("aten.to.device", "self device dtype")
def _to_device(a: Arguments) -> Tensor:
    return _cast(a["self"], a.get("dtype"))


@_means("aten.type_as.default", "self other")
def _type_as(a: Arguments) -> Tensor:
    return _cast(a["self"], a["other"].dtype)


def _cast(value: Tensor, dtype: str | None) -> Tensor:
    return value if dtype is None else o.cast(value, dtype)


@_means("aten.dropout.default aten.dropout_.default", "input p train")
def _dropout(a: Arguments) -> Tensor:
    if a.get("train") is not False:
        raise UnprovableError("it drops")
    return tensor_of(a["input"])


@_means("aten.embedding.default", "weight indices padding_idx scale_grad_by_freq sparse")
def _embedding(a: Arguments) -> Tensor:
    return t.gather(a["weight"], 0, a["indices"])


@_means("aten.matmul.default aten.mm.default aten.bmm.default", "self other")
def _matmul(a: Arguments) -> Tensor:
    return sums.matmul(a["self"], a["other"])


@_means("aten.linear.default", "input weight bias")
def _linear(a: Arguments) -> Tensor:
    found = sums.matmul(a["input"], t.transpose(a["weight"], (1, 0)))
    return found if a.get("bias") is None else o.total(found, a["bias"])


@_means("aten.mean.dim", "self dim keepdim")
def _mean(a: Arguments) -> Tensor:
    return _reduced(a, sums.mean)


@_means("aten.sum.dim_IntList", "self dim keepdim")
def _sum(a: Arguments) -> Tensor:
    return _reduced(a, sums.total)


def _reduced(a: Arguments, reduce: Any) -> Tensor:
    value = o.floating(a["self"])
    return sums.reduced_over(value, a["dim"] or (), reduce, kept=bool(a.get("keepdim", False)))


@_means("aten.cumsum.default", "self dim dtype")
def _cumsum(a: Arguments) -> Tensor:
    value = _cast(a["self"], a.get("dtype"))
    return sums.cumulated(o.cast(value, t.INT) if value.dtype == t.BOOL else value, a["dim"])


@_means("aten.diff.default", "self n dim prepend append")
def _diff(a: Arguments) -> Tensor:
    if a.get("n", 1) != 1:
        raise UnprovableError("differences of differences")
    axis = a.get("dim", -1)
    parts = [a.get("prepend"), o.floating(a["self"]), a.get("append")]
    value = t.concatenate([part for part in parts if part is not None], axis)
    size = value.shape[value.axis(axis)]
    return o.difference(
        t.cut(value, axis, as_poly(1), None), t.cut(value, axis, as_poly(0), size - 1)
    )


@_means("aten.addmm.default", "self mat1 mat2")
def _addmm(a: Arguments) -> Tensor:
    return o.total(a["self"], sums.matmul(a["mat1"], a["mat2"]))


@_means("aten.baddbmm.default", "self batch1 batch2 beta alpha")
def _baddbmm(a: Arguments) -> Tensor:
    product = sums.matmul(a["batch1"], a["batch2"])
    parts = [(a["self"], a.get("beta", 1)), (product, a.get("alpha", 1))]
    return o.total(*(o.product(x, o.literal(float(factor))) for x, factor in parts))


@_means("aten.gelu.default", "self approximate")
def _gelu(a: Arguments) -> Tensor:
    return attention.gelu(tensor_of(a["self"]), a.get("approximate", "none"))


@_means("aten.softmax.int", "self dim dtype")
def _softmax(a: Arguments) -> Tensor:
    value = tensor_of(a["self"])
    if a.get("dtype") is not None:
        value = o.cast(value, a["dtype"])
    return sums.softmax(value, a["dim"])


@_means("aten.layer_norm.default", "input normalized_shape weight bias eps cudnn_enable")
def _layer_norm(a: Arguments) -> Tensor:
    if len(a["normalized_shape"]) != 1:
        raise UnprovableError("a norm over several axes")
    return attention.layer_norm(
        a["input"], a.get("weight"), a.get("bias"), number(a.get("eps", 1e-5))
    )


@_means("qalora.rms_norm.default", "x weight eps")
def _rms_norm(a: Arguments) -> Tensor:
    return sums.rms_norm(a["x"], a["weight"], number(a["eps"]))


@_means("aten.rms_norm.default", "input normalized_shape weight eps")
def _aten_rms_norm(a: Arguments) -> Tensor:
    if len(a["normalized_shape"]) != 1 or a.get("weight") is None or a.get("eps") is None:
        raise UnprovableError("a norm without weight or eps")
    return sums.rms_norm(a["input"], a["weight"], number(a["eps"]))


@_means("qalora.rotary_embedding.default", "x cos sin heads")
def _rotary(a: Arguments) -> Tensor:
    value = a["x"]
    each = t.reshape(value, (*value.shape[:2], as_poly(a["heads"]), as_poly(-1)))
    return t.reshape(attention.rotated(each, a["cos"], a["sin"]), value.shape)


@_means("qalora.attention.default", "q k v mask past_key past_value heads kv_heads scale")
def _attention(a: Arguments) -> tuple[Tensor, ...]:
    return attention.with_past(a, a["heads"], a["kv_heads"], a["scale"])


@_means(
    "aten.scaled_dot_product_attention.default",
    "query key value attn_mask dropout_p is_causal scale enable_gqa",
)
def _sdpa(a: Arguments) -> Tensor:
    q, k, mask = a["query"], a["key"], a.get("attn_mask")
    if a.get("dropout_p", 0.0) != 0:
        raise UnprovableError("it drops")
    if not a.get("enable_gqa", False) and q.rank == 4 and q.shape[1] is not k.shape[1]:
        raise UnprovableError("the numbers of heads differ")
    causal = bool(a.get("is_causal", False))
    if causal and mask is not None:
        raise UnprovableError("it is causal and has a mask")
    scale = attention.scale_of(a.get("scale"), q.shape[-1])
    return attention.attention(q, k, a["value"], mask, scale, causal=causal)
