"""CachedAttention at every level: against float64, against its function, and what it refuses."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from qalora_compile.exporters.onnx.attention_function import attention_function
from qalora_compile.runtime.library import kernel_levels
from tests.runtime.layer import forced, open_model

Arrays = dict[str, NDArray[Any]]
SIZES = [(9, 3, 64, 64), (4, 4, 48, 40), (8, 1, 17, 3)]
CALLS = [(1, 1, 0), (1, 1, 130), (2, 1, 64), (1, 7, 9), (2, 33, 70), (1, 3, 255), (2, 0, 5)]


def model(heads: int, kv_heads: int, scale: float, mask: NDArray[Any]) -> onnx.ModelProto:
    make = onnx.helper
    names = ["q", "k", "v", "mask", "past_key", "past_value"]
    sizes = {"q_num_heads": heads, "kv_num_heads": kv_heads, "scale": scale}
    results = ["y", "present_key", "present_value"]
    node = make.make_node("CachedAttention", names, results, domain="qalora", **sizes)
    types = dict.fromkeys((*names, *results), onnx.TensorProto.FLOAT)
    types["mask"] = make.np_dtype_to_tensor_dtype(mask.dtype)
    infos = {
        n: make.make_tensor_value_info(n, t, [None] * (3 if n in "qkvy" else 4))
        for n, t in types.items()
    }
    graph = make.make_graph(
        [node], "attention", [infos[n] for n in names], [infos[n] for n in results]
    )
    opsets = [make.make_opsetid("", 23), make.make_opsetid("qalora", 1)]
    return make.make_model(
        graph, opset_imports=opsets, ir_version=10, functions=[attention_function(23)]
    )


def inputs(
    size: tuple[int, int, int, int], call: tuple[int, int, int], kind: str, seed: int = 0
) -> Arrays:
    """Arrays of a call of `(batch, queries, past)`; the mask is causal with holes, or of floats."""
    (heads, kv_heads, width, value_width), (batch, queries, past) = size, call
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> NDArray[Any]:
        return generator.standard_normal(shape).astype(np.float32)

    mask = draw(batch, heads, queries, past + queries)
    if kind == "bool":
        lower = np.tril(np.ones((queries, past + queries), bool), past)
        mask = lower & (generator.random((batch, 1, queries, past + queries)) < 0.8)
        mask[:, :, :, past : past + 1] = True
        mask[..., : past // 3] = False  # padding before the first token
    return {
        "q": draw(batch, queries, heads * width),
        "k": draw(batch, queries, kv_heads * width),
        "v": draw(batch, queries, kv_heads * value_width),
        "mask": mask,
        "past_key": draw(batch, kv_heads, past, width),
        "past_value": draw(batch, kv_heads, past, value_width),
    }


def reference(given: Arrays, heads: int, kv_heads: int, scale: float) -> tuple[NDArray[Any], ...]:
    def by_head(name: str, count: int) -> NDArray[Any]:
        rows = given[name]
        width = rows.shape[2] // count
        return rows.reshape(*rows.shape[:2], count, width).transpose(0, 2, 1, 3)

    keys = np.concatenate([given["past_key"], by_head("k", kv_heads)], 2)
    values = np.concatenate([given["past_value"], by_head("v", kv_heads)], 2)
    every = [np.repeat(t, heads // kv_heads, 1).astype(np.float64) for t in (keys, values)]
    scores = by_head("q", heads).astype(np.float64) @ every[0].swapaxes(-1, -2) * scale
    mask = given["mask"]
    scores = np.where(mask, scores, -1e30) if mask.dtype == bool else scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ every[1]
    batch, queries, _ = given["q"].shape
    rows = y.transpose(0, 2, 1, 3).reshape(batch, queries, heads * values.shape[3])
    return rows, keys, values


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_reference(size: tuple[int, int, int, int], kind: str, level: str) -> None:
    heads, kv_heads, width, _ = size
    for seed, call in enumerate(CALLS):
        given = inputs(size, call, kind, seed)
        with forced(os.environ, level):
            session = open_model(model(heads, kv_heads, width**-0.5, given["mask"]), threads=2)
        y, keys, values = session.run(None, given)
        expected = reference(given, heads, kv_heads, width**-0.5)
        np.testing.assert_allclose(y, expected[0], rtol=0, atol=4e-6)
        assert np.array_equal(keys, expected[1])
        assert np.array_equal(values, expected[2])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_the_function_is_the_same(kind: str) -> None:
    """A session without the library takes ONNX Runtime's own Attention."""
    given = inputs(SIZES[0], (2, 5, 20), kind)
    made = model(9, 3, 0.125, given["mask"])
    stock = onnxruntime.InferenceSession(made.SerializeToString())
    for ours, theirs in zip(open_model(made).run(None, given), stock.run(None, given), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=4e-6)


def test_a_row_without_any_key_is_zero_as_in_the_function() -> None:
    given = inputs((2, 1, 16, 16), (1, 3, 4), "bool")
    given["mask"][:, :, 1] = False
    made = model(2, 1, 0.25, given["mask"])
    y = open_model(made).run(None, given)[0]
    stock = onnxruntime.InferenceSession(made.SerializeToString()).run(None, given)[0]
    assert not y[0, 1].any()
    np.testing.assert_allclose(y, stock, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": (1, 1, 7)}, r"input 0 \(q\) has shape \[1, 1, 7\], expected a multiple of 2 heads"),
        ({"k": (1, 2, 16)}, r"input 1 \(k\) has shape \[1, 2, 16\], expected \[1, 1, 16\]"),
        ({"mask": (1, 1, 1, 7)}, r"input 3 \(mask\) has shape .* expected \[1, 1, 1, 5\]"),
        ({"mask": (2, 1, 1, 5)}, r"input 3 \(mask\) has shape .* expected \[1, 1, 1, 5\]"),
        ({"past_value": (1, 1, 3, 16)}, r"input 5 \(past_value\) .* expected \[1, 1, 4, 16\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, tuple[int, ...]], said: str) -> None:
    given = inputs((2, 1, 16, 16), (1, 1, 4), "float")
    given["mask"] = given["mask"][:, :1]
    session = open_model(model(2, 1, 0.25, given["mask"]))
    changed = {name: np.zeros(shape, np.float32) for name, shape in changes.items()}
    with pytest.raises(Exception, match=f"CachedAttention: {said}"):
        session.run(None, given | changed)


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("queries", [1, 40])
def test_a_buffer_with_room_is_appended_to(queries: int, level: str) -> None:
    """One buffer is past and present; what lies behind the cache stays, and is not read."""
    given = inputs((4, 2, 16, 16), (2, queries, 9), "bool")
    with forced(os.environ, level):
        session = open_model(model(4, 2, 0.25, given["mask"]))
    expected = reference(given, 4, 2, 0.25)
    binding = session.io_binding()
    buffers = {}
    for name in ("key", "value"):
        room = np.full((2, 2, 80, 16), np.nan, np.float32)
        room[:, :, :9] = given[f"past_{name}"]
        buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(room)
        binding.bind_ortvalue_input(f"past_{name}", buffers[name])
        binding.bind_ortvalue_output(f"present_{name}", buffers[name])
    for name in ("q", "k", "v", "mask"):
        binding.bind_cpu_input(name, given[name])
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    np.testing.assert_allclose(binding.get_outputs()[-1].numpy(), expected[0], atol=4e-6)
    for name, wanted in (("key", expected[1]), ("value", expected[2])):
        kept = buffers[name].numpy()
        assert np.array_equal(kept[:, :, : 9 + queries], wanted)
        assert np.isnan(kept[:, :, 9 + queries :]).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(0, 1), (3, 2), (2, 0), (2, 4)])
def test_heads_that_do_not_fit_are_refused(heads: int, kv_heads: int) -> None:
    with pytest.raises(Exception, match="CachedAttention: attributes q_num_heads"):
        open_model(model(heads, kv_heads, 1.0, np.zeros((1, 1, 1, 1), bool)))
