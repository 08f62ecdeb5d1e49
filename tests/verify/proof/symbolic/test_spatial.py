"""Convolutions, pooling, norms over channels, orders and recurrences mean what runtimes compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from qalora_compile.verify.proof.graphs.stored_tensor import digest_of, from_array
from qalora_compile.verify.proof.symbolic import ordering, recurrent
from qalora_compile.verify.proof.symbolic.fx_operators import ATEN
from qalora_compile.verify.proof.symbolic.onnx_operators import onnx_value
from qalora_compile.verify.proof.symbolic.operators import stored
from qalora_compile.verify.proof.symbolic.polynomial import as_poly, size
from qalora_compile.verify.proof.symbolic.tensor import Tensor, TooShortError, UnprovableError
from tests.verify.proof.symbolic.numbers import Numbers, array
from tests.verify.proof.symbolic.test_fx_operators import SIZES, given, torch_operator

IMAGE, WAVE = ("b", 4, 5, 6), ("b", 4, 9)
CHANNELS = [(4,), (4,)]
FX: dict[str, tuple[str, list[Any], list[Any], dict[str, Any]]] = {
    "conv": ("conv2d.default", [IMAGE, (3, 4, 3, 2), (3,)], [[2, 1], [1, 0], [1, 2]], {}),
    "conv in groups": (
        "conv2d.default",
        [IMAGE, (6, 2, 2, 2)],
        [None, [1, 1], [0, 0], [1, 1], 2],
        {},
    ),
    "conv of depth": ("conv1d.default", [WAVE, (4, 1, 3), (4,)], [[2], [1], [2], 4], {}),
    "conv of one size": (
        "conv1d.padding",
        [WAVE, (2, 4, 4), (2,)],
        [],
        {"padding": "same", "dilation": [2]},
    ),
    "conv of an unknown length": (
        "conv1d.default",
        [("b", 2, "l"), (3, 2, 3)],
        [None, [2], [1]],
        {},
    ),
    "any conv": (
        "convolution.default",
        [IMAGE, (2, 4, 3, 3), (2,)],
        [[1, 1], [1, 1], [1, 1], False, [0, 0], 1],
        {},
    ),
    "largest": ("max_pool2d.default", [IMAGE], [[3, 2], [2, 2], [1, 0]], {}),
    "largest, spread": ("max_pool1d.default", [WAVE], [[2], [1], [0], [2]], {}),
    "mean": ("avg_pool2d.default", [IMAGE], [[3, 3], [2, 2], [1, 1]], {}),
    "mean of all": ("adaptive_avg_pool2d.default", [IMAGE], [[1, 1]], {}),
    "mean of parts": ("adaptive_avg_pool2d.default", [("b", 4, 6, 4)], [[3, 2]], {}),
    "batch norm": (
        "batch_norm.default",
        [IMAGE, *CHANNELS, *CHANNELS],
        [False, 0.1, 1e-3, True],
        {},
    ),
    "group norm": ("group_norm.default", [WAVE], [2], {}),
    "pad": ("constant_pad_nd.default", [("b", 3, 4)], [[1, 2, 0, -1], 0.5], {}),
    "gate": ("glu.default", [("b", 6, "s")], [1], {}),
    "weight norm": ("_weight_norm.default", [(3, 4, 5), (3, 1, 1)], [0], {}),
    "baddbmm": (
        "baddbmm.default",
        [(3, 1, 4), (3, 2, 5), (3, 5, 4)],
        [],
        {"beta": 0.5, "alpha": 2.0},
    ),
    "in place": ("add_.Tensor", [("b", "s"), ("s",)], [], {}),
    "squares": ("square.default", [("b", "s")], [], {}),
    "e^x - 1": ("expm1.default", [("b", "s")], [], {}),
    "subtracted": ("rsub.Scalar", [("b", "s")], [2.0], {}),
    "in the shape of": ("reshape_as.default", [("b", 6), ("b", 2, 3)], [], {}),
    "moved": ("movedim.int", [("b", "s", 4)], [-2, -1], {}),
    "like": ("zeros_like.default", [("b", "s")], [], {}),
}
ONNX: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "conv": (
        "Conv",
        [IMAGE, (3, 4, 3, 2), (3,)],
        {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]},
    ),
    "conv in groups": ("Conv", [IMAGE, (6, 2, 2, 2)], {"group": 2}),
    "largest": ("MaxPool", [IMAGE], {"kernel_shape": [3, 2], "pads": [1, 0, 0, 1]}),
    "mean with padding": (
        "AveragePool",
        [IMAGE],
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    ),
    "mean": ("AveragePool", [IMAGE], {"kernel_shape": [2, 3], "strides": [2, 1]}),
    "mean of all": ("GlobalAveragePool", [IMAGE], {}),
    "batch norm": ("BatchNormalization", [IMAGE, *CHANNELS, *CHANNELS], {"epsilon": 1e-3}),
    "instance norm": ("InstanceNormalization", [WAVE, *CHANNELS], {}),
    "group norm": ("GroupNormalization", [WAVE, *CHANNELS], {"num_groups": 2}),
    "pad": ("Pad", [("b", 3), np.array([0, 2, 0, 1]), np.array(0.5, np.float32)], {}),
    "length": ("ReduceL2", [("b", "s", 4), np.array([0, 2])], {"keepdims": 0}),
    "attention of four axes": (
        "Attention",
        [("b", 2, "s", 4), ("b", 1, "p", 4), ("b", 1, "p", 4)],
        {},
    ),
}
_L = 7
ALL_SIZES = SIZES | {"l": _L}


def _pair(shape: tuple[Any, ...], place: int, *, spread: bool) -> tuple[Tensor, torch.Tensor]:
    concrete = tuple(_L if axis == "l" else axis for axis in shape)
    value, real = given(concrete, f"x{place}")
    if shape != concrete:
        sizes = tuple(
            size("l", least=1) if a == "l" else s for a, s in zip(shape, value.shape, strict=True)
        )
        value = Tensor(sizes, value.dtype, lambda index: value_at(f"x{place}", index))
    return value, real.abs() + 0.5 if spread else real


def value_at(name: str, index: Any) -> Any:
    """An element of an operand."""
    from qalora_compile.verify.proof.symbolic.expression import leaf

    return leaf(name, index)


def _numbers(leaves: dict[str, Any]) -> Numbers:
    atoms = {
        a: n for name, n in ALL_SIZES.items() for s in (0, 1) for a in size(name, least=s).atoms
    }
    return Numbers(leaves, atoms)


@pytest.mark.parametrize("name", FX)
@pytest.mark.parametrize("normal", [False, True], ids=["as it is", "normal form"])
def test_aten(name: str, normal: bool) -> None:
    torch.manual_seed(len(name))
    op, shapes, rest, options = FX[name]
    pairs = [_pair(s, i, spread=name == "batch norm" and i == 4) for i, s in enumerate(shapes)]
    leaves = {f"x{i}": real.clone().numpy() for i, (_, real) in enumerate(pairs)}
    wanted = torch_operator(f"aten.{op}")(*(real for _, real in pairs), *rest, **options)
    value = ATEN.value(f"aten.{op}", [*(x for x, _ in pairs), *rest], options)
    assert [_numbers({}).poly(s) for s in value.shape] == [*wanted.shape]
    found = array(value, _numbers(leaves), normal=normal)
    np.testing.assert_allclose(found, wanted.double().numpy(), atol=3e-6)


@pytest.mark.parametrize("name", ONNX)
@pytest.mark.parametrize("normal", [False, True], ids=["as it is", "normal form"])
def test_onnx_runtime(name: str, normal: bool) -> None:
    torch.manual_seed(len(name))
    op, operands, options = ONNX[name]
    symbolic, real, constants = [], [], {}
    for place, operand in enumerate(operands):
        if isinstance(operand, np.ndarray):
            symbolic.append(stored(from_array(f"x{place}", operand)))
            real.append(operand)
            continue
        pair = _pair(operand, place, spread=name == "batch norm" and place == 4)
        symbolic.append(pair[0])
        real.append(pair[1].numpy())
    constants = {f"x{i}": values for i, values in enumerate(real)}
    value = onnx_value(f"onnx.{op}", symbolic, options)
    value = value[0] if isinstance(value, tuple) else value
    (wanted,) = run(op, real, options, 1)
    found = array(value, _numbers(constants), normal=normal)
    np.testing.assert_allclose(found, wanted.astype(float), atol=3e-6)


def run(op: str, values: list[Any], options: dict[str, Any], results: int) -> list[Any]:
    """What ONNX Runtime computes."""
    kinds = {"f": TensorProto.FLOAT, "i": TensorProto.INT64}
    names, made = [f"x{i}" for i in range(len(values))], [f"y{i}" for i in range(results)]
    pairs = list(zip(names, values, strict=True))
    graph = helper.make_graph(
        [helper.make_node(op, [n if v is not None else "" for n, v in pairs], made, **options)],
        "one",
        [
            helper.make_tensor_value_info(n, kinds[v.dtype.kind], v.shape)
            for n, v in pairs
            if v is not None
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: list[Any] = session.run(made, {n: v for n, v in pairs if v is not None})
    return found


def test_what_has_no_meaning_here_is_refused() -> None:
    image, wave = given(IMAGE, "x")[0], given(WAVE, "w")[0]
    weight = given((3, 4, 3, 3), "k")[0]
    long = Tensor((as_poly(1), as_poly(2), size("l")), "float32", lambda i: value_at("l", i))
    cases: list[tuple[Any, str, list[Any], dict[str, Any], str]] = [
        (ATEN.value, "aten.conv2d.default", [image, given((3, 2, 3, 3), "k")[0]], {}, "channels"),
        (
            ATEN.value,
            "aten.conv2d.padding",
            [image, weight, None, [2, 2], "same"],
            {},
            "with steps",
        ),
        (ATEN.value, "aten.max_pool2d.default", [image, [2, 2]], {"ceil_mode": True}, "cut off"),
        (ATEN.value, "aten.avg_pool1d.default", [wave, [3], [1], [1], False, False], {}, "leaves"),
        (ATEN.value, "aten.adaptive_avg_pool2d.default", [image, [2, 2]], {}, "one size"),
        (ATEN.value, "aten.batch_norm.default", [image, *[None] * 4, True], {}, "statistics"),
        (ATEN.value, "aten.add_.Tensor", [given((6,), "a")[0], image], {}, "another shape"),
        (ATEN.value, "aten.conv1d.default", [wave, given((3, 4, 12), "k")[0]], {}, "longer"),
        (onnx_value, "onnx.Conv", [image, weight], {"auto_pad": "SAME_UPPER"}, "depends on the"),
        (onnx_value, "onnx.Conv", [image, weight], {"kernel_shape": [2, 3]}, "another size"),
        (onnx_value, "onnx.MaxPool", [image], {"kernel_shape": [2], "strides": [1]}, "axes"),
        (onnx_value, "onnx.GRU", [wave] * 6, {"hidden_size": 4}, "another layout|reset"),
        (
            onnx_value,
            "onnx.TopK",
            [wave, stored(from_array("k", np.array([1])))],
            {"sorted": 0},
            "order",
        ),
    ]
    for meaning, op, args, options, why in cases:
        with pytest.raises(UnprovableError, match=why):
            meaning(op, args, options)
    with pytest.raises(TooShortError, match="is not known to be from 0"):
        ATEN.value("aten.slice.Tensor", [long, 2, 0, -1], {})


def _order_of(value: Tensor) -> Any:
    """The name of the order that the places in a tensor are of."""
    (term,) = value[tuple(as_poly(0) for _ in value.shape)].detail.terms
    return term[0][0].first.detail[0]


def test_orders_are_of_complete_tensors() -> None:
    x, real = given((3, 5), "x")
    y, _ = given((3, 5), "y")
    values, places = ATEN.value("aten.topk.default", [x, 2], {})
    wanted = real.topk(2)
    numbers = _numbers({"x": real.numpy(), _order_of(places): wanted.indices.numpy()})
    np.testing.assert_array_equal(array(places, numbers, normal=True), wanted.indices)
    np.testing.assert_array_equal(array(values, numbers, normal=True), wanted.values)
    k = stored(from_array("k", np.array([2])))
    assert _order_of(onnx_value("onnx.TopK", [x, k], {})[1]) == _order_of(places)
    others = [
        onnx_value("onnx.TopK", [y, k], {})[1],
        onnx_value("onnx.TopK", [x, k], {"largest": 0})[1],
        onnx_value("onnx.TopK", [x, k], {"axis": 0})[1],
        ATEN.value("aten.topk.default", [x, 3], {})[1],
        ATEN.value("aten.topk.default", [ATEN.value("aten.mul.Tensor", [x, 2.0], {}), 2], {})[1],
    ]
    assert _order_of(places) not in [_order_of(other) for other in others]


def test_experts_are_counted_and_put_back_in_order() -> None:
    scores, real = given((4, 3), "x")
    _, chosen = ATEN.value("aten.topk.default", [scores, 2], {})
    ids = ATEN.value("aten.view.default", [chosen, [8]], {})
    _, order = ATEN.value("aten.sort.default", [ids], {})
    wanted = real.topk(2).indices.reshape(-1)
    at = wanted.sort(stable=True).indices
    leaves = {_order_of(chosen): real.topk(2).indices.numpy(), _order_of(order): at.numpy()}
    counts = ATEN.value("aten.histc.default", [ids, 3, 0, 2], {})
    last = np.nextafter(np.float32(2), np.float32(3))
    edges = np.asarray([0, 2 / 3, 4 / 3, last], np.float32)
    leaves |= {f"const {digest_of(edges)}": edges}
    found = array(counts, _numbers(leaves), normal=True)
    np.testing.assert_array_equal(found, torch.histc(wanted.float(), 3, 0, 2))
    positions = ATEN.value("aten.arange.default", [8], {})
    empty = ATEN.value("aten.empty_like.default", [order], {})
    back = ATEN.value("aten.index_put_.default", [empty, [order], positions], {})
    leaves[_order_of(back)] = at.argsort().numpy()
    np.testing.assert_array_equal(array(back, _numbers(leaves), normal=True), at.argsort())
    with pytest.raises(UnprovableError, match="may be equal"):  # ids come several times
        ordering.inverse_order(ids, positions)
    with pytest.raises(UnprovableError, match="may be equal"):
        ordering.scattered(ids, 0, ids, ids)
    with pytest.raises(UnprovableError, match="not known to be in its bins"):
        ATEN.value("aten.histc.default", [ids, 2, 0, 1], {})


@pytest.mark.parametrize("kind", [recurrent.LSTM, recurrent.GRU])
@pytest.mark.parametrize("both_ways", [False, True], ids=["forward", "both ways"])
def test_a_recurrence_of_torch_is_that_of_onnx(kind: str, both_ways: bool) -> None:
    """The operands that ATen's form gives one layer, run by ONNX Runtime, give torch's states."""
    torch.manual_seed(1)
    module = getattr(torch.nn, kind)(3, 2, bidirectional=both_ways)
    x = torch.randn(4, 2, 3)
    operands: list[list[Any]] = []

    def recorded(_: str, direction: str, values: Any) -> Any:
        operands.append([direction, *values])
        shape = (values[0].shape[0], values[0].shape[1], values[2].shape[1])
        one = Tensor(shape, "float32", lambda index: value_at("y", index))
        return (one, *(Tensor(shape[1:], "float32", one._element) for _ in values[4:]))

    first = [torch.randn(2 if both_ways else 1, 2, 2) for _ in range(2 if kind == "LSTM" else 1)]
    params = [stored(from_array(n, p.detach().numpy())) for n, p in module.named_parameters()]
    states = [stored(from_array(f"h{i}", s.numpy())) for i, s in enumerate(first)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent, "layer", recorded)
        hx = tuple(states) if kind == "LSTM" else states[0]
        ATEN.value(
            f"aten.{kind.lower()}.input",
            [
                stored(from_array("x", x.numpy())),
                hx,
                tuple(params),
                True,
                1,
                0.0,
                False,
                both_ways,
                False,
            ],
            {},
        )
    constants = {}
    for array_ in (x, *first, *(p.detach() for p in module.parameters())):
        flat = np.ascontiguousarray(array_.numpy().reshape(-1))
        constants[f"const {digest_of(flat)}"] = flat
        if array_.dim() == 2:
            turned = np.ascontiguousarray(array_.numpy().T.reshape(-1))
            constants[f"const {digest_of(turned)}"] = turned
    wanted = module(x, tuple(first) if kind == "LSTM" else first[0])[0].detach()
    for place, (direction, *values) in enumerate(operands):
        real = []
        for value in values:
            known = value.stored
            one = (
                known.values()
                if known is not None
                else array(value, _numbers(constants), normal=False)
            )
            real.append(np.asarray(one, np.float32))
        seen, into, recurrence, biases, *begin = real
        options = {"hidden_size": 2, "direction": direction}
        options |= {"linear_before_reset": 1} if kind == "GRU" else {}
        inputs = [seen, into[None], recurrence[None], biases[None], None, *(b[None] for b in begin)]
        (found,) = run(kind, inputs, options, 1)
        np.testing.assert_allclose(found[:, 0], wanted[..., 2 * place : 2 * place + 2], atol=1e-6)
