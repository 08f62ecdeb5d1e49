"""What a file of another program takes for granted of its inputs, and which tables it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qalora_compile.verify.proof.graphs.graph import Graph
from qalora_compile.verify.proof.graphs.stored_tensor import Array, StoredTensor
from qalora_compile.verify.proof.symbolic.expression import (
    ONE,
    ZERO,
    Expr,
    function,
    integer,
    leaf,
    mul,
    truth,
    where,
)
from qalora_compile.verify.proof.symbolic.operators import stored
from qalora_compile.verify.proof.symbolic.polynomial import as_poly
from qalora_compile.verify.proof.symbolic.tensor import FLOAT, INT, Index, Shape, Tensor

Shapes = Mapping[str, Shape]
POSITIONS, MASK, TYPES = "position_ids", "attention_mask", "token_type_ids"
BITS = "bits of attention_mask"
_PAST = "past_key_values.0.key"
_GQA = "com.microsoft.GroupQueryAttention"
_TEXTS = {
    POSITIONS: "position_ids count on from past_sequence: the file computes them so",
    MASK: "all elements of attention_mask are 1: the file reads only how many there are",
    BITS: "all elements of attention_mask are 0 or 1",
    TYPES: "all elements of token_type_ids are 0: the program has no such input",
}
_ULP = 2.0**-23


def assume(graphs: tuple[Graph, Graph]) -> None:
    """Put what the second graph takes for granted into both, as values and conditions."""
    one, other = graphs
    there = {name for name, _ in other.inputs.values()}
    known = {name for name, _ in one.inputs.values()}
    taken = []
    if any(node.op == _GQA for node in other.nodes.values()):
        taken.append(MASK)
    elif MASK in known:
        taken.append(BITS)
    if POSITIONS in known - there:
        taken.append(POSITIONS)
    if TYPES in there - known:
        taken.append(TYPES)
    for graph in graphs:
        given = {name: value for value, (name, _) in graph.inputs.items()}
        for name in taken:
            read = MASK if name == BITS else name
            if read in given:
                graph.given[given[read]] = _MAKERS[name]
    one.assumed += tuple(_TEXTS[name] for name in taken)
    _assume_tables(graphs)


def _positions(shapes: Shapes) -> Tensor:
    past = shapes[_PAST][2] if _PAST in shapes else as_poly(0)
    return Tensor(shapes[POSITIONS], INT, lambda index: integer(past + index[1]))


def _bits(shapes: Shapes) -> Tensor:
    def element(index: Index) -> Expr:
        return where(truth(leaf(f"input {MASK} is 1", index)), ONE, ZERO)

    return Tensor(shapes[MASK], INT, element)


def _filled(name: str, value: Expr) -> Callable[[Shapes], Tensor]:
    return lambda shapes: Tensor(shapes[name], INT, lambda _: value)


_MAKERS: dict[str, Callable[[Shapes], Tensor]] = {
    POSITIONS: _positions,
    MASK: _filled(MASK, ONE),
    BITS: _bits,
    TYPES: _filled("input_ids", ZERO),
}


def _assume_tables(graphs: tuple[Graph, Graph]) -> None:
    """Tables of cos and sin in the second graph as functions of the first one's frequencies."""
    one, other = graphs
    frequencies = [t for name, t in one.tensors.items() if name.endswith("inv_freq")]
    worst, rows = 0.0, set[int]()
    for name, table in other.tensors.items():
        for frequency in frequencies:
            found = _turn(table, frequency)
            if found is not None:
                op, apart = found
                other.given[f"@{name}"] = _table(op, table, frequency)
                worst, rows = max(worst, apart), rows | {table.shape[0]}
    if rows:
        one.assumed += (
            f"positions are below {min(rows)}, the rows of the file's tables of cos and sin",
            "these tables, which are float32, stand for cos and sin of position · frequency, from "
            f"which they differ by at most {worst:.2g}",
        )


def _turn(table: StoredTensor, frequency: StoredTensor) -> tuple[str, float] | None:
    """`cos` or `sin` if a table holds it of position · frequency, and the largest difference.

    An entry may differ by the rounding of its angle to float32, and by its own.
    """
    if table.dtype != "float32" or len(table.shape) != 2 or len(frequency.shape) != 1:
        return None
    if table.shape[1] != frequency.size or table.shape[0] < 2:
        return None
    values = table.wide()
    angles: Array = np.arange(table.shape[0])[:, None] * frequency.wide()[None, :]
    for op, turn in (("cos", np.cos), ("sin", np.sin)):
        apart = np.abs(values - turn(angles))
        if (apart <= _ULP * (2 + angles)).all():
            return op, float(apart.max())
    return None


def _table(op: str, table: StoredTensor, frequency: StoredTensor) -> Callable[[Shapes], Any]:
    shape = tuple(map(as_poly, table.shape))
    by = stored(frequency)

    def element(index: Index) -> Expr:
        return function(op, mul(integer(index[0]), by[(index[1],)]))

    return lambda _: Tensor(shape, FLOAT, element)
