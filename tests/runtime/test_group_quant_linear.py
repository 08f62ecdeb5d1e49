"""The operator's numbers: every level against a float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora_compile.runtime.library import kernel_levels
from tests.runtime.layer import Array, Layer, forced, make_model, open_model

LEVELS = kernel_levels()
EVERY_LEVEL = pytest.mark.parametrize("level", LEVELS)


def run(layer: Layer, level: str, *, threads: int = 1) -> tuple[Array, dict[str, Array]]:
    arrays = layer.arrays()
    with forced(os.environ, level):
        session = open_model(make_model(arrays, layer.attributes()), threads=threads)
    return session.run(None, {"x": arrays["x"]})[0], arrays


def check(layer: Layer, level: str, *, threads: int = 1) -> None:
    y, arrays = run(layer, level, threads=threads)
    expected, bound = layer.reference(arrays)
    assert y.dtype == arrays["x"].dtype
    assert y.shape == expected.shape
    excess = np.abs(y.astype(np.float64) - expected) / bound
    assert excess.max(initial=0) <= 1, (level, layer, float(excess.max()))


def test_the_library_is_built_and_has_levels() -> None:
    assert "scalar" in LEVELS


GROUP_SIZES = (16, 32, 48, 64, 80, 96, 128, 256, 512)

LAYERS = st.builds(
    Layer,
    bits=st.sampled_from((2, 3, 4, 8)),
    group_size=st.sampled_from(GROUP_SIZES),
    k=st.one_of(st.integers(1, 300), st.sampled_from((512, 576, 1000, 1536))),
    n=st.integers(1, 70),
    m=st.one_of(st.integers(1, 9), st.integers(1, 129)),
    compute=st.sampled_from(("fp32", "int8")),
    half_x=st.booleans(),
    half_parameters=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 2),
)


@EVERY_LEVEL
@settings(max_examples=150, deadline=None)
@given(layer=LAYERS)
def test_equals_the_reference(level: str, layer: Layer) -> None:
    check(layer.but(scale=1 / layer.k**0.5 / 2**layer.bits), level)


@EVERY_LEVEL
@settings(max_examples=60, deadline=None)
@given(
    layer=LAYERS,
    exponent=st.integers(-30, 25),
    far=st.sampled_from((0.0, 1e2, 1e4, 1e7)),
)
def test_extreme_scales_and_far_zero_points(
    level: str, layer: Layer, exponent: int, far: float
) -> None:
    check(layer.but(half_x=False, half_parameters=False, scale=10.0**exponent, far=far), level)


@EVERY_LEVEL
@pytest.mark.parametrize("compute", ["fp32", "int8"])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 16, 128, 129])
def test_every_number_of_rows(level: str, compute: str, m: int) -> None:
    check(Layer(k=200, n=130, m=m, group_size=48, compute=compute, bias=True), level)


@EVERY_LEVEL
def test_more_than_one_thread(level: str) -> None:
    check(Layer(k=512, n=515, m=7, scale=0.01), level, threads=2)


@EVERY_LEVEL
@pytest.mark.parametrize("compute", ["fp32", "int8"])
def test_no_rows_give_no_rows(level: str, compute: str) -> None:
    y, _ = run(Layer(m=0, compute=compute), level)
    assert y.shape == (0, 8)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 3, 1, 64)])
def test_leading_axes_are_kept(shape: tuple[int, ...]) -> None:
    layer = Layer(m=int(np.prod(shape[:-1])))
    arrays = layer.arrays()
    flat, _ = layer.reference(arrays)
    x = arrays["x"].reshape(shape)
    session = open_model(make_model(arrays | {"x": x}, layer.attributes()))
    y = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(y, flat.reshape(*shape[:-1], 8), rtol=1e-4, atol=1e-5)


@EVERY_LEVEL
@pytest.mark.parametrize("compute", ["fp32", "int8"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_in_its_row(level: str, compute: str, value: float) -> None:
    layer = Layer(m=3, k=70, compute=compute)
    arrays = layer.arrays()
    arrays["x"][1, 5] = value
    with forced(os.environ, level):
        y = open_model(make_model(arrays, layer.attributes())).run(None, {"x": arrays["x"]})[0]
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


@EVERY_LEVEL
def test_weights_may_be_inputs(level: str) -> None:
    layer = Layer(bias=True)
    arrays = layer.arrays()
    expected, bound = layer.reference(arrays)
    with forced(os.environ, level):
        session = open_model(make_model(arrays, layer.attributes(), constant=False))
    assert (np.abs(session.run(None, arrays)[0] - expected) <= bound).all()


def test_a_group_beyond_k_is_one_group() -> None:
    check(Layer(k=20, group_size=512), LEVELS[-1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"K": None}, "attribute K is missing"),
        ({"K": 0}, "attribute K is 0, expected 1"),
        ({"K": -5}, "attribute K is -5"),
        ({"N": 2**40}, "attribute N is 1099511627776"),
        ({"K": 3.5}, "attribute K is missing or no integer"),
        ({"bits": 5}, "attribute bits is 5, expected 2, 3, 4 or 8"),
        ({"group_size": 24}, "attribute group_size is 24, expected a multiple of 16"),
        ({"group_size": 0}, "attribute group_size is 0"),
        ({"compute": "bf16"}, 'attribute compute is "bf16"'),
        ({"compute": 4}, "attribute compute is a number"),
        ({"N": 9}, r"input 1 \(codes\) has shape \[8, 2, 16\], expected \[N, "),
        ({"bits": 8}, r"input 1 \(codes\) has shape"),
    ],
)
def test_wrong_attributes_fail_when_the_session_is_made(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(Exception, match=words):
        open_model(Layer().model(**changes))


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("codes", np.zeros((8, 2, 15), np.uint8), r"input 1 \(codes\)"),
        ("codes", np.zeros((8, 32), np.uint8), r"input 1 \(codes\)"),
        ("codes", np.zeros((8, 2, 16), np.int8), "GroupQuantLinear"),
        ("scale", np.zeros((8, 3), np.float32), r"input 2 \(scale\)"),
        ("scale", np.zeros(16, np.float32), r"input 2 \(scale\)"),
        ("scale", np.zeros((8, 2), np.float64), "GroupQuantLinear"),
        ("zero_point", np.zeros((9, 2), np.float32), r"input 3 \(zero_point\)"),
        ("zero_point", np.zeros((8, 2), np.uint8), "GroupQuantLinear"),
        ("zero_point", np.zeros((8, 2), np.float16), "GroupQuantLinear"),
        ("bias", np.zeros(7, np.float32), r"input 4 \(bias\)"),
        ("bias", np.zeros(8, np.float16), "GroupQuantLinear"),
    ],
)
def test_wrong_inputs_fail_when_the_session_is_made(name: str, array: Array, words: str) -> None:
    layer = Layer()
    with pytest.raises(Exception, match=words):
        open_model(make_model(layer.arrays() | {name: array}, layer.attributes()))


@pytest.mark.parametrize("name", ["x", "codes", "scale", "zero_point", "bias"])
def test_wrong_shapes_fail_when_the_model_runs(name: str) -> None:
    layer = Layer(bias=True)
    arrays = layer.arrays()
    session = open_model(make_model(arrays, layer.attributes(), constant=False))
    wrong = np.concatenate([arrays[name]] * 2, axis=-1)
    with pytest.raises(Exception, match=f"\\({name}\\) has shape"):
        session.run(None, arrays | {name: wrong})


HUGE = """
import resource, sys
import numpy as np, onnx
from onnx import TensorProto, helper
from qalora_compile.runtime.library import register
import onnxruntime

k, n = 2**31 - 1, 2**31 - 1
value = lambda name, kind, shape: helper.make_tensor_value_info(name, kind, shape)
stated = sys.argv[1] == "stated"
shapes = [["m", k], [n, 2**26, 16], [n, 2**26], [n, 2**26]] if stated else [["m", k], *[None] * 3]
kinds = [TensorProto.FLOAT, TensorProto.UINT8, TensorProto.FLOAT, TensorProto.FLOAT]
inputs = [value(name, *rest) for name, *rest in zip("xcsz", kinds, shapes)]
node = helper.make_node(
    "GroupQuantLinear", list("xcsz"), ["y"], domain="qalora", K=k, N=n, bits=4, group_size=32
)
graph = helper.make_graph([node], "g", inputs, [value("y", TensorProto.FLOAT, None)])
opsets = [helper.make_opsetid("", 20), helper.make_opsetid("qalora", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
assert len(model) < 400, len(model)
options = onnxruntime.SessionOptions()
register(options)
small = onnxruntime.InferenceSession(onnx.helper.make_model(
    helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g",
                      [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])]),
    ir_version=10, opset_imports=opsets).SerializeToString(), options)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
session = onnxruntime.InferenceSession(model, options)
feed = {"x": np.zeros((1, 8), np.float32), "c": np.zeros((1, 1, 16), np.uint8)}
try:
    session.run(None, feed | dict.fromkeys("sz", np.zeros((1, 1), np.float32)))
except Exception as error:
    print("refused:", str(error).splitlines()[0])
print("kB:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("shapes", ["stated", "unknown"])
def test_a_small_file_that_says_it_is_huge_allocates_nothing(shapes: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUGE, shapes],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "refused:" in done.stdout
    assert int(done.stdout.rpartition("kB:")[2]) < 16_000, done.stdout


def test_an_unknown_level_is_an_error_that_lists_the_levels() -> None:
    with forced(os.environ, "sse9"), pytest.raises(Exception, match='"sse9".*scalar'):
        open_model(Layer().model())
