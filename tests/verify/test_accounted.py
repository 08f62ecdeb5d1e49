"""What a node says is accounted for: what its meaning does not read is no equality.

Graphs are made by hand here, as an exporter or a pass with a mistake could leave them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qalora_compile.errors import UserInputError
from qalora_compile.verify.proof.graphs.graph import FX, ONNX, Graph, Node, Ref, Tensor
from qalora_compile.verify.proof.graphs.onnx_subgraphs import body_of, captured
from qalora_compile.verify.proof.graphs.read_onnx import onnx_nodes
from qalora_compile.verify.proof.graphs.stored_tensor import Array, from_array
from qalora_compile.verify.proof.match_structure import DIFFERENT, OPEN, PROVED, compare_structure

X, C = Ref("x"), Tensor("c")
ONES = np.ones(8, np.float32)


def graph(
    dialect: str, *nodes: Node, dtype: str = "float32", mask: str = "", **tensors: Any
) -> Graph:
    """A graph of x whose last node is its output."""
    inputs: dict[str, tuple[str, str | None]] = {"x": ("x", dtype)}
    if mask:
        inputs[mask] = (mask, "float32")
    stored = {name: from_array(name, values) for name, values in tensors.items()}
    outputs = {"o": Ref(nodes[-1].name)}
    named = {node.name: node for node in nodes}
    return Graph(dialect, "g", "folded", named, inputs, outputs, stored, {}, {})


def node(op: str, *args: Any, name: str = "y", **options: Any) -> Node:
    return Node(name, op, args, options, f"%{name} = {op}")


def status(a: Graph, b: Graph) -> str:
    (segment,) = compare_structure(a, b).segments
    assert compare_structure(a, a).same
    return segment.status


def mean(**options: Any) -> Graph:
    return graph(FX, node("aten.mean.dim", X, (-1,), True, **options))


def norm(**options: Any) -> Graph:
    made = node("onnx.LayerNormalization", X, C, C, epsilon=1e-5, **options)
    return graph(ONNX, made, c=ONES)


def plus(value: Any, dtype: str = "float32", **tensors: Any) -> Graph:
    return graph(FX, node("aten.add.Tensor", X, value), dtype=dtype, **tensors)


IDENTITY = graph(FX, node("aten.clone.default", X))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (mean(), mean(dtype="float16")),
        (norm(), norm(stash_type=16)),
        (graph(FX, node("aten.slice.Tensor", X, 1, 0, end=5)), IDENTITY),
        (graph(FX, node("aten.relu.default", X, new=1)), graph(FX, node("aten.relu.default", X))),
        (plus(1, "float16"), plus(1, "float32")),
        (plus(C, c=ONES), plus(C, c=ONES.astype(np.float16))),
        (plus(C, c=np.ones(1, np.float32)), plus(C, c=np.ones((1, 1, 1), np.float32))),
        (plus(C, c=np.zeros((1, 1, 1), np.float32)), IDENTITY),
        (plus(2**53, "int64"), plus(2**53 + 1, "int64")),
        (plus(0.0, "int64"), plus(0, "int64")),
    ],
    ids=[
        "precision of a mean",
        "precision of a norm",
        "end of a slice",
        "option of a unary operator",
        "dtype of an input",
        "dtype of a constant",
        "axes of one element",
        "axes of a zero",
        "large integers",
        "zero that makes floats",
    ],
)
def test_what_differs_in_one_thing_is_different(a: Graph, b: Graph) -> None:
    assert status(a, b) == DIFFERENT


def test_the_same_numbers_in_both_kinds_of_graph_are_equal() -> None:
    ids = graph(ONNX, node("onnx.Add", X, C), dtype="int64", c=np.array(2))
    assert status(plus(2, "int64"), ids) == PROVED
    one = graph(ONNX, node("onnx.Add", X, C), dtype="int64", c=np.array([2]))
    assert status(plus(2, "int64"), one) == OPEN, "of an x without axes it would have one"
    tenth = graph(ONNX, node("onnx.Add", X, C), c=np.array(0.1, np.float32))
    assert status(plus(0.1), tenth) == PROVED


def test_float64_numbers_are_not_rounded_to_float32() -> None:
    rounded = np.array(np.float64(np.float32(0.1)))
    other = graph(ONNX, node("onnx.Add", X, C), dtype="float64", c=rounded)
    assert status(plus(0.1, "float64"), other) == DIFFERENT
    exact = graph(ONNX, node("onnx.Add", X, C), dtype="float64", c=np.array(0.1))
    assert status(plus(0.1, "float64"), exact) == PROVED


def viewed(eps: float, weight: Array = ONES) -> Graph:
    view = node("aten.view.default", X, (-1, 8), name="v")
    return graph(FX, view, node("aten.layer_norm.default", Ref("v"), (8,), C, C, eps), c=weight)


def reshaped(eps: float, weight: Array = ONES) -> Graph:
    view = node("onnx.Reshape", X, Tensor("s"), name="v")
    made = node("onnx.LayerNormalization", Ref("v"), C, C, epsilon=eps)
    return graph(ONNX, view, made, c=weight, s=np.array([-1, 8]))


def test_options_of_a_known_operator_count_behind_an_opaque_one() -> None:
    assert status(viewed(1e-5), reshaped(1e-5)) == OPEN
    assert status(viewed(1e-5), reshaped(1e-6)) == DIFFERENT


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("w", 1 + 1e-5, DIFFERENT),
        ("w", 1.0, OPEN),
        ("other", 1.0, OPEN),
        ("other", 1 + 1e-5, DIFFERENT),
        ("other", 7.0, OPEN),  # another tensor, for samples to tell
    ],
)
def test_parameters_of_opaque_operators_are_equal(name: str, values: float, found: str) -> None:
    weight = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    ours = graph(FX, node("aten.conv1d.default", X, Tensor("w")), w=weight)
    made = node("onnx.Conv", X, Tensor(name))
    stored: dict[str, Any] = {name: weight * np.float32(values)}
    theirs = graph(ONNX, made, **stored)
    assert status(ours, theirs) == found


def test_a_parameter_may_be_stored_transposed_or_with_other_axes() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    ours = graph(FX, node("aten.einsum.default", X, Tensor("w")), w=weight)
    for values in (weight.T, weight.reshape(1, 6)):
        theirs = graph(ONNX, node("onnx.Einsum", X, Tensor("w")), w=values)
        assert status(ours, theirs) == OPEN


def test_a_mask_that_one_graph_does_not_read_is_a_difference() -> None:
    def ours(mask: Any) -> Graph:
        return graph(FX, node("aten.where.self", X, mask), mask="attention_mask")

    theirs = graph(ONNX, node("onnx.Where", X, Ref("attention_mask")), mask="attention_mask")
    assert status(ours(Ref("attention_mask")), theirs) == OPEN
    assert status(ours(1.0), theirs) == DIFFERENT


@pytest.mark.parametrize(("result", "expected"), [(0, DIFFERENT), (1, OPEN), (2, OPEN)])
def test_the_cache_that_attention_gives_takes_no_mask(result: int, expected: str) -> None:
    operands = (X, X, X, Ref("attention_mask"))
    made = Node("y", "onnx.Attention", operands, {}, "%y", output=result)
    ours = graph(FX, node("aten.cat.default", (X, X)), mask="attention_mask")
    assert status(ours, graph(ONNX, made, mask="attention_mask")) == expected


def branching(captures: str, factor: float = 1.0, inner: str = "o") -> Graph:
    """If, whose branches multiply x by a stored matrix."""
    helper = onnx.helper
    product = helper.make_node("MatMul", ["x", captures], [inner])
    body = helper.make_graph([product], "g", [], [onnx.ValueInfoProto(name=inner)])
    proto = helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)
    assert captured(proto) == ["x", captures]
    stored: dict[str, Any] = {captures: np.eye(8, dtype=np.float32) * np.float32(factor)}
    return graph(ONNX, *onnx_nodes(proto, {captures}), **stored)


def test_what_a_branch_captures_is_compared() -> None:
    assert status(branching("W"), branching("W", 2.0)) == DIFFERENT
    assert status(branching("W"), branching("V", inner="other")) == PROVED, "names do not count"


def test_bodies_that_compute_something_else_have_other_hashes() -> None:
    helper = onnx.helper

    def hashed(op: str) -> str:
        nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node(op, ["a"], ["b"])]
        body = helper.make_graph(nodes, "g", [], [onnx.ValueInfoProto(name="b")])
        return body_of(body)[0]

    assert hashed("Tanh") == hashed("Tanh")
    assert hashed("Tanh") != hashed("Relu")


CLONE = node("aten.clone.default", X, name="c")
TURNED, AGAIN = (node("aten.transpose.int", Ref("c"), 0, 1, name=n) for n in ("t", "u"))
TURNED_INPUT = node("aten.transpose.int", X, 0, 1, name="t")
TOPK = node("aten.topk.default", X, 2, name="k")
FIRST, SECOND = (node("_operator.getitem", Ref("k"), 0, name=n) for n in ("p", "q"))


@pytest.mark.parametrize(
    "nodes",
    [
        (
            CLONE,
            node("aten.select.int", Ref("c"), 1, 0, name="v"),
            node("aten.fill_.Scalar", Ref("v"), 5.0, name="f"),
            node("aten.relu.default", Ref("c")),
        ),
        (CLONE, node("aten.relu_.default", Ref("c"), name="r"), node("aten.neg.default", Ref("c"))),
        (node("aten.relu_.default", X),),
        (
            CLONE,
            TURNED,
            node("aten.relu_.default", Ref("t"), name="r"),
            node("aten.neg.default", Ref("c")),
        ),
        (
            CLONE,
            TURNED,
            AGAIN,
            node("aten.relu_.default", Ref("t"), name="r"),
            node("aten.neg.default", Ref("u")),
        ),
        (
            TOPK,
            FIRST,
            SECOND,
            node("aten.relu_.default", Ref("p"), name="r"),
            node("aten.neg.default", Ref("q")),
        ),
        (TURNED_INPUT, node("aten.relu_.default", Ref("t"))),
    ],
    ids=[
        *("into a view", "read under its old name", "into an input", "through a view"),
        *("read through another view", "taken twice", "through a view of an input"),
    ],
)
def test_hidden_writes_are_refused(nodes: tuple[Node, ...]) -> None:
    made = graph(FX, *nodes)
    with pytest.raises(UserInputError, match="writes into a tensor"):
        compare_structure(made, made)


def test_a_write_that_is_read_by_its_result_is_compared() -> None:
    def made(value: float) -> Graph:
        add = node("aten.add_.Tensor", Ref("c"), value, name="a")
        drop = node("aten.dropout_.default", Ref("a"), 0.5, False, name="d")
        return graph(FX, CLONE, add, drop, node("aten.relu_.default", Ref("d")))

    assert status(made(1.0), made(2.0)) == DIFFERENT


@pytest.mark.parametrize(
    "nodes", [(CLONE, TURNED), (TOPK, FIRST)], ids=["of a view", "of a result"]
)
def test_a_write_into_what_nothing_else_reads_is_compared(nodes: tuple[Node, ...]) -> None:
    def made(value: float) -> Graph:
        return graph(FX, *nodes, node("aten.add_.Tensor", Ref(nodes[-1].name), value))

    assert status(made(1.0), made(2.0)) == DIFFERENT
    assert status(made(1.0), made(1.0)) == PROVED


def test_broken_graphs_are_our_errors() -> None:
    unmade = graph(ONNX, node("onnx.Relu", Ref("z")))
    with pytest.raises(UserInputError, match="nothing computes the value z"):
        compare_structure(unmade, unmade)
    short = graph(ONNX, node("onnx.Pow", X))
    with pytest.raises(UserInputError, match="not fit the definition of its operator"):
        compare_structure(short, short)
