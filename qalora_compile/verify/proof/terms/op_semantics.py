"""Semantics of ATen and ONNX operators as terms, for computations that both can express."""

from __future__ import annotations

import math
from typing import Any

from qalora_compile.untrusted.element_types import FLOATS
from qalora_compile.verify.proof.graphs.graph import FX, ONNX, OPENVINO, Graph, Node, Tensor
from qalora_compile.verify.proof.graphs.read_onnx import ONNX_TYPES
from qalora_compile.verify.proof.terms.semantics import OpSemantics, Semantics
from qalora_compile.verify.proof.terms.term import (
    INTEGERS,
    UNKNOWN,
    Term,
    as_number,
    term,
)

_END = 2**62
_UNARY = {
    "sqrt": "Sqrt",
    "exp": "Exp",
    "log": "Log",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "relu": "Relu",
    "erf": "Erf",
    "sin": "Sin",
    "cos": "Cos",
    "abs": "Abs",
}
_SAME = ("alias", "contiguous", "clone", "detach", "lift_fresh_copy")
_MODAL = ("dropout", "dropout_", "feature_dropout", "alpha_dropout")


def _first(m: Semantics, node: Node) -> Term:
    first, *_ = node.args
    return m.of(first)


def _unary(op: str) -> OpSemantics:
    return lambda m, node: term(op, [_first(m, node)], line=m.line(node))


def _add(m: Semantics, node: Node) -> Term | None:
    if node.options.get("alpha", 1) != 1:
        return None
    return m.algebra.sum([m.of(a) for a in node.args], m.line(node))


def _subtract(m: Semantics, node: Node) -> Term | None:
    if node.options.get("alpha", 1) != 1:
        return None
    a, b = (m.of(v) for v in node.args)
    return m.algebra.sum([a, m.algebra.negated(b, m.line(node))], m.line(node))


def _multiply(m: Semantics, node: Node) -> Term:
    return m.algebra.product([m.of(a) for a in node.args], m.line(node))


def _divide(m: Semantics, node: Node) -> Term | None:
    a, b = (m.of(v) for v in node.args)
    if a.dtype not in FLOATS or node.options.get("rounding_mode") is not None:
        return None  # ONNX's Div of integers returns integers
    return m.algebra.product([a, m.algebra.inverse(b, m.line(node))], m.line(node))


def _negate(m: Semantics, node: Node) -> Term:
    return m.algebra.negated(_first(m, node), m.line(node))


def _reciprocal(m: Semantics, node: Node) -> Term:
    return m.algebra.inverse(_first(m, node), m.line(node))


def _inverse_root(m: Semantics, node: Node) -> Term:
    root = term("sqrt", [_first(m, node)], line=m.line(node))
    return m.algebra.inverse(root, m.line(node))


def _power(m: Semantics, node: Node) -> Term | None:
    base, power = (m.of(v) for v in node.args)
    exponent = as_number(power)
    if exponent is None or base.dtype in INTEGERS:  # ONNX's Pow of integers returns integers
        return None
    exponent = float(exponent)
    if exponent in (2, 3):
        return m.algebra.product([base] * int(exponent), m.line(node))
    if exponent == -0.5:
        return _inverse_root(m, node)
    wide = base.dtype == "float64"
    shown = as_number(power, exact=True) if wide else exponent
    return term("pow", [base], shown, line=m.line(node))


def _silu(m: Semantics, node: Node) -> Term:
    x = _first(m, node)
    return m.algebra.product([x, term("sigmoid", [x], line=m.line(node))], m.line(node))


def _modal(m: Semantics, node: Node) -> Term | None:
    """A dropout that is off, as `read_fx` reads it in evaluation mode."""
    return _first(m, node) if node.get("train") is False else None


def _gelu(m: Semantics, node: Node) -> Term | None:
    if node.options.get("approximate", "none") != "none" or len(node.args) > 1:
        return None
    x, a, line = _first(m, node), m.algebra, m.line(node)
    inner = term("erf", [a.product([x, a.number(math.sqrt(0.5))], line)], line=line)
    return a.product([a.number(0.5), x, a.sum([a.number(1.0), inner], line)], line)


def _normed(m: Semantics, node: Node, eps: float, weight: Any) -> Term:
    """X / √(mean(x²) + eps) · weight."""
    x, a, line = _first(m, node), m.algebra, m.line(node)
    mean = term("mean", [a.product([x, x], line)], "last, kept", line=line)
    root = term("sqrt", [a.sum([mean, a.number(eps)], line)], line=line)
    return a.product([x, a.inverse(root, line), m.of(weight)], line)


def _fx_rms_norm(m: Semantics, node: Node) -> Term | None:
    if node.op == "qalora.rms_norm.default":
        return _normed(m, node, node["eps"], node["weight"])
    weight, eps = node.get("weight"), node.get("eps")
    if len(node["normalized_shape"]) != 1 or weight is None or eps is None:
        return None
    return _normed(m, node, eps, weight)


def _last_in_float32(node: Node) -> bool:
    """Whether a norm is over the last axis, with default precision."""
    return (node.options.get("axis", -1), node.options.get("stash_type", 1)) == (-1, 1)


def _onnx_rms_norm(m: Semantics, node: Node) -> Term | None:
    if not _last_in_float32(node):
        return None
    return _normed(m, node, node.options.get("epsilon", 1e-5), node["scale"])


def _layer_norm(m: Semantics, node: Node, eps: float, operands: tuple[Any, ...]) -> Term:
    args = [m.of(v) for v in operands if v is not None]
    given = [v is not None for v in (*operands, None)[:3]]
    detail = f"{m.algebra.rounded(eps)!r}, {given}"
    return term("layer_norm", args, detail, line=m.line(node))


def _fx_layer_norm(m: Semantics, node: Node) -> Term | None:
    if len(node["normalized_shape"]) != 1:
        return None
    operands = node["input"], node.get("weight"), node.get("bias")
    return _layer_norm(m, node, node.get("eps", 1e-5), operands)


def _onnx_layer_norm(m: Semantics, node: Node) -> Term | None:
    if not _last_in_float32(node) or node.output:
        return None
    return _layer_norm(m, node, node.options.get("epsilon", 1e-5), node.args)


def _fx_mean(m: Semantics, node: Node) -> Term | None:
    if tuple(node["dim"] or ()) != (-1,) or not node.get("keepdim", False):
        return None
    if node.options.get("dtype") not in (None, _first(m, node).dtype):
        return None  # computed at another precision
    return term("mean", [_first(m, node)], "last, kept", line=m.line(node))


def _onnx_mean(m: Semantics, node: Node) -> Term | None:
    axes = node.get("axes")
    axes = axes if isinstance(axes, tuple) else integers(m.graph, axes)
    if tuple(axes or ()) != (-1,) or node.options.get("keepdims", 1) != 1:
        return None
    return term("mean", [_first(m, node)], "last, kept", line=m.line(node))


def _fx_softmax(m: Semantics, node: Node) -> Term | None:
    if node.get("dim") != -1 or node.get("dtype") not in (None, _first(m, node).dtype):
        return None
    return term("softmax", [_first(m, node)], "last", line=m.line(node))


def _onnx_softmax(m: Semantics, node: Node) -> Term | None:
    if node.options.get("axis", -1) != -1:
        return None
    return term("softmax", [_first(m, node)], "last", line=m.line(node))


def _take_rows(m: Semantics, table: Any, ids: Any, line: str) -> Term | None:
    if not isinstance(table, Tensor) or len(m.graph.tensors[table.name].shape) != 2:
        return None
    stored = m.of(table)
    return term("rows", [stored, m.of(ids)], line=line, dtype=stored.dtype)


def _embedding(m: Semantics, node: Node) -> Term | None:
    return _take_rows(m, node["weight"], node["indices"], m.line(node))


def _gather(m: Semantics, node: Node) -> Term | None:
    if node.options.get("axis", 0) != 0:
        return None
    return _take_rows(m, node["data"], node["indices"], m.line(node))


def _transposed(m: Semantics, operand: Any) -> Term | None:
    """The transpose of a matrix."""
    if isinstance(operand, Tensor) and len(m.graph.tensors[operand.name].shape) == 2:
        return m.algebra.constant(m.graph.tensors[operand.name], transposed=True)
    return None


def _matmul(m: Semantics, node: Node) -> Term:
    return term("matmul", [m.of(v) for v in node.args], line=m.line(node))


def _fx_linear(m: Semantics, node: Node) -> Term | None:
    return _affine(m, node, _transposed(m, node["weight"]), node.get("bias"))


def _affine(m: Semantics, node: Node, weight: Term | None, bias: Any) -> Term | None:
    """The first operand times a weight, plus a bias where there is one."""
    if weight is None:
        return None
    product = term("matmul", [_first(m, node), weight], line=m.line(node))
    return product if bias is None else m.algebra.sum([product, m.of(bias)], m.line(node))


def _addmm(m: Semantics, node: Node) -> Term | None:
    if node.options:
        return None
    bias, *factors = (m.of(v) for v in node.args)
    product = term("matmul", factors, line=m.line(node))
    return m.algebra.sum([bias, product], m.line(node))


def _gemm(m: Semantics, node: Node) -> Term | None:
    plain = node.options.get("alpha", 1.0) == node.options.get("beta", 1.0) == 1.0
    if not plain or node.options.get("transA", 0):
        return None
    transposed = node.options.get("transB", 0)
    weight = _transposed(m, node["B"]) if transposed else m.of(node["B"])
    return _affine(m, node, weight, node.get("C"))


def _transpose(m: Semantics, node: Node) -> Term | None:
    return _transposed(m, node["data"]) if node.options.get("perm", (1, 0)) == (1, 0) else None


def _fx_transpose(m: Semantics, node: Node) -> Term | None:
    matrix, *axes = node.args
    two = node.op != "aten.transpose.int" or set(axes) in ({0, 1}, {-1, -2})
    return _transposed(m, matrix) if two else None


def _fx_cast(m: Semantics, node: Node) -> Term | None:
    dtype = node.get("dtype")
    if node.options.get("layout") not in (None, "strided"):
        return None
    return m.algebra.cast(_first(m, node), dtype, m.line(node))


def _type_as(m: Semantics, node: Node) -> Term | None:
    like = m.of(node["other"]).dtype
    return None if like in (None, UNKNOWN) else m.algebra.cast(_first(m, node), like, m.line(node))


def _onnx_cast(m: Semantics, node: Node) -> Term | None:
    dtype = ONNX_TYPES.get(int(node.options["to"]))
    return None if dtype is None else m.algebra.cast(_first(m, node), dtype, m.line(node))


def _onnx_dropout(m: Semantics, node: Node) -> Term | None:
    mode = node.get("training_mode")
    if node.output:
        return None
    if mode is not None and not _is_false(m.graph, mode):
        return term("dropout", [_first(m, node)], line=m.line(node))
    return _first(m, node)


def _is_false(graph: Graph, operand: Any) -> bool:
    return isinstance(operand, Tensor) and not graph.tensors[operand.name].values().any()


def _fx_slice(m: Semantics, node: Node) -> Term | None:
    start, end, step = (node.get(name) for name in ("start", "end", "step"))
    complete = start in (None, 0) and (end is None or (isinstance(end, int) and end > _END))
    return _first(m, node) if complete and step in (None, 1) else None


def _onnx_slice(m: Semantics, node: Node) -> Term | None:
    start, end, step = (integers(m.graph, node.get(name)) for name in ("starts", "ends", "steps"))
    if not start or not end or any(start) or min(end) <= _END:
        return None
    return _first(m, node) if node.get("steps") is None or (step and set(step) == {1}) else None


def _fx_batch_norm(m: Semantics, node: Node) -> Term | None:
    *operands, training, _, eps, _ = node.args
    if training or None in operands:
        return None
    detail = repr(m.algebra.rounded(eps))
    return term("batch_norm", [m.of(v) for v in operands], detail, line=m.line(node))


def _onnx_batch_norm(m: Semantics, node: Node) -> Term | None:
    if node.options.get("training_mode", 0) or node.output:
        return None
    detail = repr(m.algebra.rounded(node.options.get("epsilon", 1e-5)))
    return term("batch_norm", [m.of(v) for v in node.args], detail, line=m.line(node))


def integers(graph: Graph, operand: Any) -> list[int] | None:
    """The values of a small stored tensor of integers."""
    if not isinstance(operand, Tensor) or graph.tensors[operand.name].dtype not in (
        "int64",
        "int32",
    ):
        return None
    return [int(v) for v in graph.tensors[operand.name].values().reshape(-1)]


_FX: dict[str, OpSemantics] = {
    **{f"aten.{op}.default": _unary(op) for op in _UNARY},
    **dict.fromkeys((f"aten.{name}.default" for name in _SAME), _first),
    **dict.fromkeys((f"aten.{name}.default" for name in _MODAL), _modal),
    **dict.fromkeys(("aten.add.Tensor", "aten.add.Scalar"), _add),
    **dict.fromkeys(("aten.sub.Tensor", "aten.sub.Scalar"), _subtract),
    **dict.fromkeys(("aten.mul.Tensor", "aten.mul.Scalar"), _multiply),
    **dict.fromkeys(("aten.div.Tensor", "aten.div.Scalar"), _divide),
    **dict.fromkeys(("aten.to.dtype", "aten.to.device", "aten.to.dtype_layout"), _fx_cast),
    **dict.fromkeys(("aten.mm.default", "aten.matmul.default"), _matmul),
    **dict.fromkeys(("aten.t.default", "aten.transpose.int"), _fx_transpose),
    **dict.fromkeys(("aten.rms_norm.default", "qalora.rms_norm.default"), _fx_rms_norm),
    "aten.type_as.default": _type_as,
    "aten.neg.default": _negate,
    "aten.reciprocal.default": _reciprocal,
    "aten.rsqrt.default": _inverse_root,
    "aten.pow.Tensor_Scalar": _power,
    "aten.silu.default": _silu,
    "aten.gelu.default": _gelu,
    "aten.mean.dim": _fx_mean,
    "aten.layer_norm.default": _fx_layer_norm,
    "aten.batch_norm.default": _fx_batch_norm,
    "aten.softmax.int": _fx_softmax,
    "aten.embedding.default": _embedding,
    "aten.linear.default": _fx_linear,
    "aten.addmm.default": _addmm,
    "aten.slice.Tensor": _fx_slice,
}
_ONNX: dict[str, OpSemantics] = {
    **{f"onnx.{name}": _unary(op) for op, name in _UNARY.items()},
    "onnx.Identity": _first,
    "onnx.Dropout": _onnx_dropout,
    "onnx.Add": _add,
    "onnx.Sub": _subtract,
    "onnx.Mul": _multiply,
    "onnx.Div": _divide,
    "onnx.Neg": _negate,
    "onnx.Reciprocal": _reciprocal,
    "onnx.Pow": _power,
    "onnx.Gelu": _gelu,
    "onnx.ReduceMean": _onnx_mean,
    "onnx.LayerNormalization": _onnx_layer_norm,
    "onnx.RMSNormalization": _onnx_rms_norm,
    "onnx.BatchNormalization": _onnx_batch_norm,
    "onnx.Softmax": _onnx_softmax,
    "onnx.Gather": _gather,
    "onnx.MatMul": _matmul,
    "onnx.Gemm": _gemm,
    "onnx.Transpose": _transpose,
    "onnx.Cast": _onnx_cast,
    "onnx.Slice": _onnx_slice,
}
OPERATORS: dict[str, dict[str, OpSemantics]] = {FX: _FX, ONNX: _ONNX, OPENVINO: {}}
"""OpenVINO's operators have no common form with the others: they are compared on samples."""
"""The semantics of operators, by the dialect of the graph."""
