"""Stacked experts: one product for each, on the rows that are sorted to it, then one Concat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qalora_compile.exporters.openvino.library import operators


def members(output: Any) -> list[Any]:
    """The nodes of a list that an operator takes."""
    return [value.get_node() for value in output.get_node().input_values()]


def emit_expert_adapter(context: Any) -> Any:
    """The outputs of `qalora.expert_adapter`: adapters that are not folded."""
    op = operators()
    lora_a, lora_b = context.get_input(1), context.get_input(2)
    scaling = np.float32(context.get_values_from_const_input(4))

    def compute(expert: int, rows: Any) -> Any:
        hidden = op.matmul(rows, _take(lora_a, expert), False, True)
        return op.multiply(op.matmul(hidden, _take(lora_b, expert), False, True), scaling)

    experts, n, _ = lora_b.get_shape()
    return by_expert(context, 3, int(experts), int(n), compute).outputs()


def emit_grouped_mm(context: Any) -> Any:
    """The outputs of torch's grouped product with `[E, K, N]`: experts that stay in float."""
    weight = context.get_input(1)
    experts, _, n = weight.get_shape()

    def compute(expert: int, rows: Any) -> Any:
        return operators().matmul(rows, _take(weight, expert), False, False)

    return by_expert(context, 2, int(experts), int(n), compute).outputs()


def by_expert(
    context: Any, at: int, experts: int, width: int, compute: Callable[[int, Any], Any]
) -> Any:
    """Concat of `compute(e, rows)` for the rows of input 0 that each expert has.

    Args:
        context: Of the operator.
        at: The input with the row at which each expert's rows end, `[E]`; it may be None: input 0
            is then `[E, T, K]`, and so is the result. Rows after the last expert's give zeros.
        experts: E.
        width: Columns of the result.
        compute: Emits the product of one expert; takes its number and its rows.
    """
    op = operators()
    x, first = context.get_input(0), op.constant(np.array([0], np.int64))
    if _is_none(context.get_input(at)):
        parts = [op.unsqueeze(compute(e, _take(x, e)), np.int64(0)) for e in range(experts)]
        return op.concat(parts, 0)
    ends = op.convert(context.get_input(at), "i64")
    stops = [op.gather(ends, np.array([e], np.int64), np.int64(0)) for e in range(experts)]
    step = np.array([1], np.int64)
    parts = [
        compute(e, op.slice(x, start, stop, step, first))
        for e, (start, stop) in enumerate(zip([first, *stops], stops, strict=False))
    ]
    left = op.subtract(op.gather(op.shape_of(x, "i64"), first, np.int64(0)), stops[-1])
    size = op.concat([left, op.constant(np.array([width], np.int64))], 0)
    return op.concat([*parts, op.broadcast(np.float32(0), size)], 0)


def _is_none(output: Any) -> bool:
    """Whether an operand is None, which the frontend passes on as a node of its own."""
    unknown: bool = output.get_partial_shape().rank.is_dynamic
    return unknown and output.get_node().get_input_size() == 0


def _take(x: Any, expert: int) -> Any:
    """x[e]."""
    return operators().gather(x, np.int64(expert), np.int64(0))
