"""ONNX Runtime's operators mean what it computes, at small shapes, before and in normal form."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper

import qalora_compile.verify.proof.symbolic.contrib_operators  # noqa: F401, declares operators
from qalora_compile.verify.proof.graphs.stored_tensor import from_array
from qalora_compile.verify.proof.symbolic.expression import integer
from qalora_compile.verify.proof.symbolic.onnx_operators import onnx_value
from qalora_compile.verify.proof.symbolic.operators import stored
from qalora_compile.verify.proof.symbolic.polynomial import Poly, as_poly, size
from qalora_compile.verify.proof.symbolic.tensor import Tensor, UnprovableError
from tests.verify.proof.symbolic.numbers import Numbers, array, leaves_of
from tests.verify.proof.symbolic.test_fx_operators import SIZES, given

MICROSOFT = "com.microsoft"
TYPES = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "bool": 9}
PAST = [("b", 2, "p", 4), ("b", 2, "p", 4)]
GQA = {"num_heads": 2, "kv_num_heads": 1}
CACHE = [(1, 1, "p", 16), (1, 1, "p", 16)]
TABLES, WIDER = [(9, 2), (9, 2)], [(9, 8), (9, 8)]
ROW, BLOCKS = ("b", "s", 4), np.random.default_rng(3)


def _constant(value: Poly, _: Any) -> Any:
    return integer(value)


class Lengths:
    """Integers that are known by the sizes of axes."""

    def __init__(self, value: Poly, *shape: Any, dtype: str = "int32") -> None:
        self.value, self.shape, self.dtype = value, shape, dtype


HERE = Lengths(size("p") + 1, 1, "s", dtype="int64")
LAST, TOTAL = (Lengths(size("p") + size("s") + n, *s) for n, s in ((-1, (1,)), (0, (1,))))
QKV = [(1, "s", 32), (1, "s", 16), (1, "s", 16)]
CODES = BLOCKS.integers(0, 256, (3, 2, 8), dtype=np.uint8)
SCALES = BLOCKS.standard_normal((3, 2)).astype(np.float32)
ZEROS = BLOCKS.integers(0, 256, (3, 1), dtype=np.uint8)
BITS = {"K": 24, "N": 3, "bits": 4, "block_size": 16}
TABLE = BLOCKS.integers(0, 256, (5, 16), dtype=np.uint8)
STEPS = BLOCKS.standard_normal((5, 2)).astype(np.float32)
PACKED = BLOCKS.integers(0, 256, (5, 1), dtype=np.uint8)
PICKED = np.array([[4, 0], [2, 2]])
LOOKUP = {"gather_axis": 0, "quantize_axis": 1, "block_size": 16, "bits": 4}
PLACES = np.array([[3, 0, 1], [2, 7, 8]])
CASES: dict[str, tuple[str, list[Any], dict[str, Any], int]] = {
    "simplified norm": ("SimplifiedLayerNormalization", [ROW, (4,)], {"epsilon": 1e-3}, 1),
    "skip simplified": (
        "SkipSimplifiedLayerNormalization",
        [ROW, ROW, (4,), (4,)],
        {"epsilon": 1e-3},
        4,
    ),
    "skip": ("SkipLayerNormalization", [ROW, ROW, (4,), (4,), (4,)], {"epsilon": 1e-3}, 4),
    "skip without a bias": ("SkipLayerNormalization", [ROW, ROW, (4,)], {}, 1),
    "gelu": ("Gelu", [ROW], {}, 1),
    "bias gelu": ("BiasGelu", [ROW, (4,)], {}, 1),
    "fast gelu": ("FastGelu", [ROW, (4,)], {}, 1),
    "fast gelu without a bias": ("FastGelu", [ROW], {}, 1),
    "quick gelu": ("QuickGelu", [ROW], {}, 1),
    "silu": ("QuickGelu", [ROW], {"alpha": 1.0}, 1),
    "matmul": ("FusedMatMul", [("b", "s", 4), ("b", 4, 5)], {"alpha": 0.3}, 1),
    "matmul of transposed": (
        "FusedMatMul",
        [("b", 4, "s"), ("b", 5, 4)],
        {"transA": 1, "transB": 1},
        1,
    ),
    "rotary": ("RotaryEmbedding", [(2, 3, 12), PLACES, *TABLES], {"num_heads": 3}, 1),
    "rotary of all heads": ("RotaryEmbedding", [(2, 3, 12), PLACES, *TABLES], {}, 1),
    "rotary from a place on": (
        "RotaryEmbedding",
        [("b", "s", 8), np.array([4]), *TABLES],
        {"interleaved": 1, "num_heads": 2},
        1,
    ),
    "rotary of a part": (
        "RotaryEmbedding",
        [(2, 3, 12), PLACES, *TABLES],
        {"num_heads": 2, "rotary_embedding_dim": 4},
        1,
    ),
    "rotary of four axes": ("RotaryEmbedding", [(2, 3, 3, 4), PLACES, *TABLES], {}, 1),
    "heads": (
        "MultiHeadAttention",
        [("b", "s", 8), ("b", "p", 8), ("b", "p", 8), (24,), None, ("b", 1, "s", "p")],
        {"num_heads": 2, "scale": 0.4},
        1,
    ),
    "causal heads": (
        "MultiHeadAttention",
        [("b", "s", 8), ("b", "s", 8), ("b", "s", 8)],
        {"num_heads": 2, "unidirectional": 1},
        1,
    ),
    "heads with a past": (
        "MultiHeadAttention",
        [("b", "s", 8), ("b", "s", 8), ("b", "s", 8), None, None, None, *PAST],
        {"num_heads": 2},
        3,
    ),
    "groups": ("GroupQueryAttention", [*QKV, *CACHE, LAST, TOTAL], GQA, 3),
    "groups in a window": (
        "GroupQueryAttention",
        [*QKV, *CACHE, LAST, TOTAL],
        {**GQA, "local_window_size": 2, "softcap": 3.0, "scale": 0.3},
        3,
    ),
    "groups with rotary": (
        "GroupQueryAttention",
        [*QKV, *CACHE, LAST, TOTAL, *WIDER],
        {**GQA, "do_rotary": 1},
        3,
    ),
    "groups with rotary at places": (
        "GroupQueryAttention",
        [*QKV, *CACHE, LAST, TOTAL, *WIDER, HERE],
        {**GQA, "do_rotary": 1, "rotary_interleaved": 1},
        3,
    ),
    "packed groups": (
        "GroupQueryAttention",
        [(1, "s", 64), None, None, *CACHE, LAST, TOTAL, *WIDER],
        {**GQA, "do_rotary": 1},
        3,
    ),
    "codes": ("MatMulNBits", [("b", "s", 24), CODES, SCALES, ZEROS], BITS, 1),
    "codes with a bias": (
        "MatMulNBits",
        [("b", "s", 24), CODES, SCALES.reshape(-1), None, None, (3,)],
        BITS,
        1,
    ),
    "codes of eight bits": (
        "MatMulNBits",
        [("b", "s", 32), np.repeat(CODES, 2, axis=2), SCALES],
        {**BITS, "K": 32, "bits": 8},
        1,
    ),
    "codes with zeros in float": (
        "MatMulNBits",
        [("b", "s", 24), CODES, SCALES, SCALES + 7],
        BITS,
        1,
    ),
    "rows of codes": ("GatherBlockQuantized", [TABLE, PICKED, STEPS, PACKED], LOOKUP, 1),
    "rows of codes around 8": ("GatherBlockQuantized", [TABLE, PICKED, STEPS], LOOKUP, 1),
}


def computed(op: str, values: list[Any], options: dict[str, Any], results: int) -> list[Any]:
    """What ONNX Runtime computes."""
    names = [f"x{i}" if value is not None else "" for i, value in enumerate(values)]
    there = [(n, v) for n, v in zip(names, values, strict=True) if v is not None]
    made = [f"y{i}" if results != 4 or i in (0, 3) else "" for i in range(results)]
    # The operator is registered in the standard's domain.
    domain = "" if op == "SimplifiedLayerNormalization" else MICROSOFT
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, names, made, domain=domain, **options)],
        "one",
        [info(name, TYPES[value.dtype.name], value.shape) for name, value in there],
        [info(name, 1, None) for name in made if name],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    chosen = onnxruntime.SessionOptions()
    chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), chosen)
    found: list[Any] = session.run(None, dict(there))
    return found


def operands_of(name: str) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Symbolic operands, the same as numbers, and the constants among them."""
    torch.manual_seed(len(name))
    symbolic: list[Any] = []
    real: list[Any] = []
    constants: dict[str, Any] = {}
    for place, operand in enumerate(CASES[name][1]):
        if operand is None:
            symbolic.append(None)
            real.append(None)
        elif isinstance(operand, Lengths):
            shape = tuple(size(n) if isinstance(n, str) else as_poly(n) for n in operand.shape)
            known_by = partial(_constant, operand.value)
            symbolic.append(Tensor(shape, "int64", known_by))
            known = Numbers({}, {a: SIZES[n] for n in SIZES for a in size(n).atoms})
            axes = [SIZES.get(n, n) for n in operand.shape]
            real.append(np.full(axes, known.poly(operand.value), operand.dtype))
        elif isinstance(operand, np.ndarray):
            symbolic.append(stored(from_array(f"x{place}", operand)))
            real.append(operand)
            constants |= leaves_of(operand)
        else:
            pair = given(operand, f"x{place}")
            symbolic.append(pair[0])
            real.append(pair[1].numpy())
    return symbolic, real, constants


class Codes(dict[str, Any]):
    """Leaves, with codes and zero-points unpacked by hand as the operator's document says."""

    def __init__(self, leaves: dict[str, Any], real: list[Any], bits: int) -> None:
        super().__init__(leaves)
        for value in real:
            if value is None or value.dtype != np.uint8:
                continue
            parts = [value & 15, value >> 4] if bits == 4 else [value]
            wide = np.stack(parts, -1).reshape(len(value), -1).astype(np.float32)
            for count in range(1, wide.shape[1] + 1):
                self |= leaves_of(wide[:, :count])


FORMS = [
    pytest.param(name, normal, id=f"{name}{', normal form' if normal else ''}")
    for name, (op, *_) in CASES.items()
    for normal in ([True] if op == "GroupQueryAttention" else [False, True])
]


@pytest.mark.parametrize(("name", "normal"), FORMS)
def test_each_operator_means_what_the_runtime_computes(name: str, normal: bool) -> None:
    op, _, options, results = CASES[name]
    symbolic, real, constants = operands_of(name)
    domain = "onnx" if op == "SimplifiedLayerNormalization" else MICROSOFT
    value = onnx_value(f"{domain}.{op}", symbolic, options)
    found = [v for v in (value if isinstance(value, tuple) else (value,)) if v is not None]
    wanted = computed(op, real, options, results)
    atoms = {atom: SIZES[n] for n in SIZES for atom in size(n).atoms}
    leaves = constants | {f"x{i}": values for i, values in enumerate(real)}
    known = Codes(leaves, real, options.get("bits", 4))
    for one, other in zip(found, wanted, strict=False):
        numbers = array(one, Numbers(known, atoms), normal=normal)
        np.testing.assert_allclose(numbers, other.astype(float), rtol=1e-5, atol=2e-5)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a mask of padding": ("heads", {}, "mask of padding"),
    "a norm of another axis": ("simplified norm", {"axis": 1}, "several axes"),
    "prepacked": ("codes", {"weight_prepacked": 1}, "prepacked"),
    "another shape": ("codes", {"K": 64}, "another shape"),
    "an unknown attribute": ("gelu", {"approximate": "tanh"}, "is not known"),
    "a quantized cache": ("groups", {"k_quant_type": "PER_TENSOR"}, "an attribute"),
    "a smooth softmax": ("groups", {"smooth_softmax": 1}, "an attribute"),
    "another axis": ("rows of codes", {"quantize_axis": 0}, "its axes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_here_is_refused(name: str) -> None:
    case, changed, why = REFUSED[name]
    op, _, options, _ = CASES[case]
    symbolic, _, _ = operands_of(case)
    if name == "a mask of padding":
        symbolic[4] = symbolic[0]
    domain = "onnx" if op == "SimplifiedLayerNormalization" else MICROSOFT
    with pytest.raises(UnprovableError, match=why):
        onnx_value(f"{domain}.{op}", symbolic, {**options, **changed})


def test_lengths_that_may_mean_padding_are_refused() -> None:
    symbolic, _, _ = operands_of("groups")
    lengths = given(("b",), "lengths")[0]
    symbolic[5] = Tensor(lengths.shape, "int64", lambda index: lengths[index])
    with pytest.raises(UnprovableError, match="rows with padding"):
        onnx_value(f"{MICROSOFT}.GroupQueryAttention", symbolic, GQA)
