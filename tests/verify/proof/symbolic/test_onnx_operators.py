"""ONNX's operators mean what the standard's reference evaluator computes, at small shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qalora_compile.verify.proof.graphs.stored_tensor import from_array
from qalora_compile.verify.proof.symbolic.onnx_operators import onnx_value
from qalora_compile.verify.proof.symbolic.operators import stored
from qalora_compile.verify.proof.symbolic.polynomial import size
from qalora_compile.verify.proof.symbolic.tensor import UnprovableError
from tests.verify.proof.symbolic.numbers import Numbers, array, leaves_of
from tests.verify.proof.symbolic.test_fx_operators import SIZES, given, sized

OPSET = 23
HEADS = {"q_num_heads": 4, "kv_num_heads": 2}
PAST = [("b", 2, "p", 2), ("b", 2, "p", 2)]
QKV = [("b", "s", 8), ("b", "s", 4), ("b", "s", 4)]
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "attention": ("Attention", QKV, HEADS),
    "causal attention": ("Attention", QKV, {**HEADS, "is_causal": 1}),
    "attention with a softcap": ("Attention", QKV, {**HEADS, "softcap": 2.0, "scale": 0.9}),
    "attention with a mask": ("Attention", [*QKV, ("b", 1, "s", "s", bool)], HEADS),
    "attention with a past": ("Attention", [*QKV, ("b", 1, "s", 5), *PAST], HEADS),
    "rotary": (
        "RotaryEmbedding",
        [("b", "s", 8), ("b", "s", 2), ("b", "s", 2)],
        {"num_heads": 2},
    ),
    "rotary of neighbours": (
        "RotaryEmbedding",
        [("b", "s", 8), ("b", "s", 2), ("b", "s", 2)],
        {"num_heads": 2, "interleaved": 1},
    ),
    "rotary of a part": (
        "RotaryEmbedding",
        [("b", "s", 12), ("b", "s", 2), ("b", "s", 2)],
        {"num_heads": 2, "rotary_embedding_dim": 4},
    ),
    "rotary of four axes": (
        "RotaryEmbedding",
        [("b", 2, "s", 4), ("b", "s", 2), ("b", "s", 2)],
        {},
    ),
    "rms norm": ("RMSNormalization", [("b", "s", 4), (4,)], {"epsilon": 1e-3}),
    "layer norm": ("LayerNormalization", [("b", "s", 4), (4,), (4,)], {}),
    "softmax": ("Softmax", [("b", "s")], {"axis": -1}),
    "reshape": ("Reshape", [("b", "s", 8), np.array([0, 0, -1, 4])], {}),
    "slice": (
        "Slice",
        [("b", 7), np.array([1]), np.array([-1]), np.array([1]), np.array([2])],
        {},
    ),
    "gather": ("Gather", [("b", 4, "s"), np.array([2, 0])], {"axis": 1}),
    "pairs gathered": ("GatherND", [(3, 4, "s"), np.array([[2, 0], [1, 3]])], {}),
    "elements gathered": (
        "GatherElements",
        [(3, 4), np.array([[3, 0], [1, 1], [2, 3]])],
        {"axis": 1},
    ),
    "distances": ("Abs", [np.array([[3, 0], [-4, 1]])], {}),
    "size": ("Abs", [("b", "s")], {}),
    "smallest": ("Min", [("b", "s"), ("s",), ("b", 1)], {}),
    "largest": ("Max", [("b", "s"), ("s",)], {}),
    "between": ("Clip", [("b", "s"), np.array(-0.5, np.float32), np.array(0.5, np.float32)], {}),
    "not below": ("Clip", [("b", "s"), np.array(0.25, np.float32)], {}),
    "equal parts": ("Split", [("b", 6, "s")], {"axis": 1, "num_outputs": 3}),
    "concat": ("Concat", [("b", "s", 2), ("b", "p", 2)], {"axis": 1}),
    "expand": ("Expand", [("b", 1), np.array([3, 1, 2])], {}),
    "transpose": ("Transpose", [("b", "s", 4)], {"perm": [2, 0, 1]}),
    "sum": ("ReduceSum", [("b", "s", 4), np.array([0, 2])], {"keepdims": 0}),
    "gemm": ("Gemm", [("b", 4), (3, 4), (3,)], {"transB": 1}),
    "choice": ("Where", [("b", "s", bool), ("b", "s"), ("b", "s")], {}),
}


def evaluated(op: str, values: list[Any], options: dict[str, Any], results: int) -> list[Any]:
    """What the reference evaluator computes."""
    kinds = {"f": TensorProto.FLOAT, "b": TensorProto.BOOL, "i": TensorProto.INT64}
    names = [f"x{i}" for i in range(len(values))]
    made = [f"y{i}" for i in range(results)]
    graph = helper.make_graph(
        [helper.make_node(op, names, made, **options)],
        "one",
        [
            helper.make_tensor_value_info(n, kinds[v.dtype.kind], v.shape)
            for n, v in zip(names, values, strict=True)
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    found: list[Any] = ReferenceEvaluator(model).run(None, dict(zip(names, values, strict=True)))
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("normal", [False, True], ids=["as it is", "normal form"])
def test_each_operator_means_what_the_standard_says(name: str, normal: bool) -> None:
    torch.manual_seed(len(name))
    op, operands, options = CASES[name]
    symbolic, real = [], []
    constants: dict[str, Any] = {}
    for place, operand in enumerate(operands):
        if isinstance(operand, np.ndarray):
            symbolic.append(stored(from_array(f"x{place}", operand)))
            real.append(operand)
            constants |= leaves_of(operand)
            continue
        pair = given(operand, f"x{place}")
        pair = sized(pair) if operand == ("b", 1, "s", 5) else pair
        symbolic.append(pair[0])
        real.append(pair[1].numpy())
    value = onnx_value(f"onnx.{op}", symbolic, options)
    found = value if isinstance(value, tuple) else (value,)
    if op == "Attention" and len(operands) < 6:
        found = found[:1]
    wanted = evaluated(op, real, options, len(found))
    atoms = {atom: SIZES[n] for n in SIZES for atom in size(n).atoms}
    leaves = constants | {f"x{i}": values for i, values in enumerate(real)}
    for one, other in zip(found, wanted, strict=True):
        numbers = array(one, Numbers(leaves, atoms), normal=normal)
        np.testing.assert_allclose(numbers, other.astype(float), atol=3e-6)


def test_what_the_standard_forbids_or_has_no_meaning_here_is_refused() -> None:
    x, _ = given(("b", "s", 8), "x")
    ids = stored(from_array("ids", np.array([1, 2])))
    with pytest.raises(UnprovableError, match="different types"):
        onnx_value("onnx.Mul", [x, ids], {})
    with pytest.raises(UnprovableError, match="an operand of type int64"):
        onnx_value("onnx.Cos", [ids], {})
    with pytest.raises(UnprovableError, match="have no sizes"):
        onnx_value("onnx.Split", [x], {"axis": 2, "num_outputs": 3})
    with pytest.raises(UnprovableError, match="more places"):
        onnx_value(
            "onnx.GatherElements", [given((1, 8), "y")[0], given((2, 8), "z")[0]], {"axis": 1}
        )
    with pytest.raises(UnprovableError, match="its attribute auto_pad is not known"):
        onnx_value("onnx.Softmax", [x], {"auto_pad": 1})
    with pytest.raises(UnprovableError, match="only one of past"):
        onnx_value("onnx.Attention", [x, x, x, None, x], {"q_num_heads": 2, "kv_num_heads": 2})
    with pytest.raises(UnprovableError, match="it has no symbolic form"):
        onnx_value("onnx.GridSample", [x], {})
    assert onnx.defs.onnx_opset_version() >= OPSET
