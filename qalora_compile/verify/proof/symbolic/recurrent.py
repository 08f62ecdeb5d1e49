"""LSTM and GRU layers: functions of complete tensors, in ONNX's order of gates in both dialects.

One direction of one layer is a function of its operands of which no more is known, so that two of
them are equal if their inputs, weights, biases and initial states are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qalora_compile.verify.proof.graphs.stored_tensor import Array, from_array
from qalora_compile.verify.proof.symbolic.expression import ZERO, integer, leaf
from qalora_compile.verify.proof.symbolic.operator_table import Arguments
from qalora_compile.verify.proof.symbolic.operators import stored
from qalora_compile.verify.proof.symbolic.ordering import function_of
from qalora_compile.verify.proof.symbolic.polynomial import Poly, as_poly
from qalora_compile.verify.proof.symbolic.tensor import (
    FLOAT,
    Tensor,
    UnprovableError,
    concatenate,
    cut,
    gather,
    scalar,
    transpose,
    unsqueeze,
)

LSTM, GRU = "LSTM", "GRU"
_GATES = {LSTM: (0, 3, 1, 2), GRU: (1, 0, 2)}
"""Torch's number of each gate, in ONNX's order: i o f c of i f g o, and z r h of r z n."""
_STATES = {LSTM: 2, GRU: 1}


def layer(kind: str, direction: str, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One direction: all states `[T, B, H]`, and the last one of each kind `[B, H]`.

    Args:
        kind: `LSTM` or `GRU`, which multiplies by its reset gate after its product.
        direction: `forward` or `reverse`.
        operands: X `[T, B, I]`, W `[G · H, I]`, R `[G · H, H]`, biases `[2 · G · H]`, and the first
            states `[B, H]`; the gates in ONNX's order.
    """
    x, _, recurrence, _, *states = operands
    width = recurrence.shape[1]
    if len(states) != _STATES[kind] or any(s.shape != (x.shape[1], width) for s in states):
        raise UnprovableError("the first state of a recurrence has another shape")
    name = f"{kind} {direction}"
    all_states = _function(f"{name} states", operands, (x.shape[0], x.shape[1], width))
    last = [
        _function(f"{name} last state {place}", operands, (x.shape[1], width))
        for place in range(len(states))
    ]
    return all_states, *last


def _function(name: str, operands: Sequence[Tensor], shape: tuple[Poly, ...]) -> Tensor:
    found = function_of(name, operands)
    return Tensor(shape, FLOAT, lambda index: leaf(found, index))


def _part(value: Tensor, place: int) -> Tensor:
    """Value[place]."""
    return gather(value, 0, scalar(integer(as_poly(place)), "int64"))


def fx_recurrence(kind: str, a: Arguments) -> tuple[Tensor, ...]:
    """`aten.lstm.input` or `aten.gru.input`: all layers, and their last states."""
    if not a["has_biases"] or (a["train"] and a["dropout"]):
        raise UnprovableError("a recurrence without biases, or one that drops")
    value = transpose(a["input"], (1, 0, 2)) if a["batch_first"] else a["input"]
    states = a["hx"] if kind == LSTM else (a["hx"],)
    directions = ("forward", "reverse") if a["bidirectional"] else ("forward",)
    weights, last = iter(a["params"]), list[tuple[Tensor, ...]]()
    for number in range(int(a["num_layers"])):
        results = []
        for place, direction in enumerate(directions):
            into, recurrence, *biases = (next(weights) for _ in range(4))
            first = [_part(state, number * len(directions) + place) for state in states]
            ordered = (_by_gate(kind, into), _by_gate(kind, recurrence), _biases(kind, biases))
            results.append(layer(kind, direction, (value, *ordered, *first)))
        value = concatenate([result[0] for result in results], 2)
        last += [result[1:] for result in results]
    found = [
        concatenate([unsqueeze(one, [0]) for one in group], 0) for group in zip(*last, strict=True)
    ]
    return transpose(value, (1, 0, 2)) if a["batch_first"] else value, *found


def _by_gate(kind: str, value: Tensor) -> Tensor:
    rows = value.shape[0].constant
    gates = _GATES[kind]
    if rows is None or rows % len(gates):
        raise UnprovableError("the weights of a recurrence do not fit its gates")
    width = rows // len(gates)
    parts = [cut(value, 0, as_poly(g * width), as_poly((g + 1) * width)) for g in gates]
    return concatenate(parts, 0)


def _biases(kind: str, values: Sequence[Tensor]) -> Tensor:
    """Both biases as one stored tensor, as exports have them."""
    arrays: list[Array] = []
    for value in values:
        if value.stored is None:
            raise UnprovableError("the biases of a recurrence are computed")
        gates = value.stored.values().reshape(len(_GATES[kind]), -1)
        arrays.append(gates[list(_GATES[kind])].reshape(-1))
    return stored(from_array("biases", np.concatenate(arrays)))


def onnx_recurrence(kind: str, x: Sequence[Any], options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """ONNX's LSTM or GRU: `[T, D, B, H]`, and the last states `[D, B, H]`."""
    value, into, recurrence, biases, lengths, *states = x
    if lengths is not None or options.get("layout", 0) or options.get("input_forget", 0):
        raise UnprovableError("sequences of their own lengths, or another layout")
    if kind == GRU and options.get("linear_before_reset", 0) != 1:
        raise UnprovableError("a reset before the product")
    names = {"forward": ("forward",), "bidirectional": ("forward", "reverse")}
    directions = names.get(str(options.get("direction", "forward")), ("reverse",))
    known = states[: _STATES[kind]]
    if biases is None or any(state is not None for state in states[_STATES[kind] :]):
        raise UnprovableError("a recurrence without biases, or with weights of cells")
    if biases.stored is None:
        raise UnprovableError("the biases of a recurrence are computed")
    results = []
    zeros = Tensor((value.shape[1], recurrence.shape[2]), FLOAT, lambda _: ZERO)
    for place, direction in enumerate(directions):
        first = [zeros if state is None else _part(state, place) for state in known]
        added = stored(from_array("biases", biases.stored.values()[place]))
        operands = (value, _part(into, place), _part(recurrence, place), added, *first)
        results.append(layer(kind, direction, operands))
    every, *last = zip(*results, strict=True)
    states = [concatenate([unsqueeze(one, [0]) for one in group], 0) for group in last]
    return concatenate([unsqueeze(one, [1]) for one in every], 1), *states
