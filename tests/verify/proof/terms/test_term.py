"""What counts as the same computation, and where two part."""

from __future__ import annotations

import numpy as np

from qalora_compile.verify.proof.graphs.stored_tensor import from_array
from qalora_compile.verify.proof.terms.term import Algebra, Term, differences, term

ALGEBRA = Algebra(single=True, halves=False)


def leaf(name: str, dtype: str = "float32") -> Term:
    return term("input", (), name, line=name, dtype=dtype)


X, Y, Z = map(leaf, "xyz")


def test_the_order_and_grouping_of_sums_and_products_do_not_count() -> None:
    a = ALGEBRA
    assert a.sum([a.sum([X, Y]), Z]).key == a.sum([Z, a.sum([Y, X])]).key
    assert a.product([X, a.number(2.0), a.number(0.5)]).key == X.key
    assert a.sum([X, a.number(0.0)]).key == X.key
    assert a.sum([X, X]).key != a.sum([X, X, X]).key
    assert a.sum([X, a.negated(Y)]).key != a.sum([Y, a.negated(X)]).key


def test_a_cast_counts_unless_the_value_has_that_type() -> None:
    a = ALGEBRA
    assert a.cast(X, "float32") is X
    assert a.cast(X, "float16").key != X.key
    half = a.cast(X, "float16")
    assert a.cast(half, "float32").key != X.key
    ids = leaf("ids", "int64")
    scaled = a.product([ids, a.number(0.5)])
    assert a.cast(scaled, "int64").key != scaled.key, "it rounds"
    mixed = a.sum([ids, X])
    assert a.cast(mixed, "int64").key != mixed.key
    wide = Algebra(single=True, halves=True)
    assert wide.cast(wide.cast(X, "bfloat16"), "float32").key == X.key


def test_numbers_are_compared_as_they_are_stored() -> None:
    assert ALGEBRA.number(1e-6).key == ALGEBRA.number(float(np.float32(1e-6))).key
    exact = Algebra(single=False, halves=False)
    assert exact.number(1e-6).key != exact.number(float(np.float32(1e-6))).key


def test_a_transposed_matrix_is_the_transpose_of_the_matrix() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    one = ALGEBRA.constant(from_array("w", matrix), transposed=True)
    other = ALGEBRA.constant(from_array("v", np.ascontiguousarray(matrix.T)))
    assert one.key == other.key
    assert one.key != ALGEBRA.constant(from_array("w", matrix)).key
    square = np.arange(9, dtype=np.float32).reshape(3, 3)
    stored = from_array("s", square)
    assert ALGEBRA.constant(stored).key != ALGEBRA.constant(stored, transposed=True).key


def test_the_first_difference_is_the_innermost_operand_that_differs() -> None:
    a = ALGEBRA
    tanh, relu = (term(op, [X], line=f"{op}(x)") for op in ("tanh", "relu"))
    (found,) = differences(
        a.sum([Y, a.product([tanh, Z])]), a.sum([a.product([Z, relu]), Y]), mixed=True
    )
    assert (found.reference, found.candidate, found.known) == ("tanh(x)", "relu(x)", True)
    (found,) = differences(a.sum([X, Y, Z], "whole"), a.sum([X, Y], "part"), mixed=True)
    assert found.reference == "z"
    assert found.candidate == "(no counterpart in) part"


def test_an_operator_of_one_kind_of_graph_decides_nothing_against_the_other_kind() -> None:
    view = term("aten.view", [X], dialect="fx", line="view")
    reshape = term("onnx.Reshape", [X], dialect="onnx", line="Reshape")
    assert not differences(view, reshape, mixed=True)[0].known
    assert not differences(view, X, mixed=True)[0].known
    assert differences(view, X, mixed=False)[0].known, "of one kind, they do differ"
    inside = ALGEBRA.product([term("tanh", [view]), Y])
    assert not differences(inside, ALGEBRA.product([X, Y]), mixed=True)[0].known
    assert differences(term("tanh", [view]), term("tanh", [view]), mixed=True) == []


def test_operands_that_differ_are_compared_with_what_they_share_most_with() -> None:
    """Two lookups in each graph, of different numbers: the tables do not differ."""
    words, places = leaf("words"), leaf("places")

    def lookup(table: Term, ids: str) -> Term:
        return term("gather", (table, leaf(ids, "int64")), line=f"{table.line}[{ids}]")

    for pair in (("a", "b"), ("b", "a")):
        ours = ALGEBRA.sum([lookup(words, pair[0]), lookup(places, pair[1])])
        theirs = ALGEBRA.sum([lookup(places, "c"), lookup(words, "d")])
        found = {(d.reference, d.candidate) for d in differences(ours, theirs, mixed=False)}
        assert found == {(pair[0], "d"), (pair[1], "c")}
