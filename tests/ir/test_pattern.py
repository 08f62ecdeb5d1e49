"""Which nodes count as a linear map by a parameter, and in which orientation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from qalora_compile.ir.pattern import LinearMap, get_tensor, match_linear, resolve_weight

ATEN = torch.ops.aten

Build = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node], fx.Node]


def matched(build: Build) -> LinearMap | None:
    """What is found in a graph of x, W and b."""
    graph = fx.Graph()
    x, w, b = graph.placeholder("x"), graph.get_attr("fc.weight"), graph.get_attr("fc.bias")
    node = build(graph, x, w, b)
    graph.output(node)
    return match_linear(node)


def call(graph: fx.Graph, op: object, *args: object, **kwargs: object) -> fx.Node:
    """A call_function node."""
    return graph.call_function(op, args, kwargs)  # type: ignore[arg-type]


# (builder, kind, stored as [K, N], has a bias)
FIRES: dict[str, tuple[Build, str, bool, bool]] = {
    "linear": (lambda g, x, w, b: call(g, ATEN.linear.default, x, w, b), "linear", False, True),
    "linear, no bias": (
        lambda g, x, w, b: call(g, ATEN.linear.default, x, w),
        "linear",
        False,
        False,
    ),
    "linear, bias by name": (
        lambda g, x, w, b: call(g, ATEN.linear.default, x, w, bias=b),
        "linear",
        False,
        True,
    ),
    "linear of a transpose": (
        lambda g, x, w, b: call(g, ATEN.linear.default, x, call(g, ATEN.t.default, w), b),
        "linear",
        True,
        True,
    ),
    "addmm": (lambda g, x, w, b: call(g, ATEN.addmm.default, b, x, w), "addmm", True, True),
    "addmm, alpha one": (
        lambda g, x, w, b: call(g, ATEN.addmm.default, b, x, w, alpha=1, beta=1),
        "addmm",
        True,
        True,
    ),
    "addmm of a transpose": (
        lambda g, x, w, b: call(g, ATEN.addmm.default, b, x, call(g, ATEN.t.default, w)),
        "addmm",
        False,
        True,
    ),
    "mm": (lambda g, x, w, b: call(g, ATEN.mm.default, x, w), "matmul", True, False),
    "matmul": (lambda g, x, w, b: call(g, ATEN.matmul.default, x, w), "matmul", True, False),
    "matmul, transpose(0, 1)": (
        lambda g, x, w, b: call(g, ATEN.matmul.default, x, call(g, ATEN.transpose.int, w, 0, 1)),
        "matmul",
        False,
        False,
    ),
    "matmul, transpose(-1, -2)": (
        lambda g, x, w, b: call(g, ATEN.matmul.default, x, call(g, ATEN.transpose.int, w, -1, -2)),
        "matmul",
        False,
        False,
    ),
    "matmul, permute": (
        lambda g, x, w, b: call(
            g, ATEN.matmul.default, x, call(g, ATEN.permute.default, w, [1, 0])
        ),
        "matmul",
        False,
        False,
    ),
    "matmul, numpy_T": (
        lambda g, x, w, b: call(g, ATEN.matmul.default, x, call(g, ATEN.numpy_T.default, w)),
        "matmul",
        False,
        False,
    ),
    "matmul, identity permutation": (
        lambda g, x, w, b: call(
            g, ATEN.matmul.default, x, call(g, ATEN.permute.default, w, [0, 1])
        ),
        "matmul",
        True,
        False,
    ),
    "matmul, same axis twice": (
        lambda g, x, w, b: call(g, ATEN.matmul.default, x, call(g, ATEN.transpose.int, w, 1, -1)),
        "matmul",
        True,
        False,
    ),
    "linear of two views": (
        lambda g, x, w, b: call(
            g,
            ATEN.linear.default,
            x,
            call(g, ATEN.view.default, call(g, ATEN.unsqueeze.default, w, 0), [5, 3]),
        ),
        "linear",
        False,
        False,
    ),
    "bmm": (lambda g, x, w, b: call(g, ATEN.bmm.default, x, w), "experts", True, False),
    "grouped": (
        lambda g, x, w, b: call(g, ATEN._grouped_mm.default, x, w, b),
        "experts",
        True,
        False,
    ),
    "matmul, two transposes": (
        lambda g, x, w, b: call(
            g, ATEN.matmul.default, x, call(g, ATEN.t.default, call(g, ATEN.t.default, w))
        ),
        "matmul",
        True,
        False,
    ),
}


@pytest.mark.parametrize("kind", FIRES)
def test_fires(kind: str) -> None:
    build, expected_kind, transposed, has_bias = FIRES[kind]
    found = matched(build)
    assert found is not None
    assert found.kind == expected_kind
    weight = torch.arange(15.0).view(5, 3)
    assert torch.equal(found.matrix(weight), weight.t() if transposed else weight)
    assert found.weight.target == "fc.weight"
    assert found.x.name == "x"
    assert (found.bias is not None) is has_bias
    if has_bias:
        assert found.bias is not None
        assert found.bias.target == "fc.bias"


LEFT_ALONE: dict[str, Build] = {
    "alpha": lambda g, x, w, b: call(g, ATEN.addmm.default, b, x, w, alpha=2),
    "beta": lambda g, x, w, b: call(g, ATEN.addmm.default, b, x, w, beta=0.5),
    "computed weight": lambda g, x, w, b: call(
        g, ATEN.linear.default, x, call(g, ATEN.mul.Tensor, w, 2.0), b
    ),
    "weight on the left": lambda g, x, w, b: call(g, ATEN.mm.default, w, x),
    "two inputs": lambda g, x, w, b: call(g, ATEN.mm.default, x, x),
    "a view of two inputs": lambda g, x, w, b: call(
        g, ATEN.matmul.default, x, call(g, ATEN.view.default, w, [x, 3])
    ),
    "grouped, with a bias": lambda g, x, w, b: call(
        g, ATEN._grouped_mm.default, x, w, b, call(g, ATEN.neg.default, b)
    ),
    "other operator": lambda g, x, w, b: call(g, ATEN.add.Tensor, x, w),
    "no call": lambda g, x, w, b: w,
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_leaves_alone(kind: str) -> None:
    assert matched(LEFT_ALONE[kind]) is None


def test_resolve_weight_counts_the_transposes() -> None:
    graph = fx.Graph()
    w = graph.get_attr("fc.weight")
    once = call(graph, ATEN.t.default, w)
    twice = call(graph, ATEN.t.default, once)
    assert [len(r.views) for r in map(resolve_weight, (w, once, twice)) if r] == [0, 1, 2]
    weight = torch.arange(15.0).view(5, 3)
    found = resolve_weight(twice)
    assert found is not None
    assert torch.equal(found.read(weight), weight)
    assert resolve_weight(graph.placeholder("x")) is None
    assert resolve_weight(3.0) is None


def test_get_tensor() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    assert get_tensor(module, "0.weight") is module[0].weight
    assert get_tensor(module, "0.nothing") is None
    assert get_tensor(module, "7.weight") is None
    assert get_tensor(module, "0") is None
