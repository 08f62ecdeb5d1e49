"""Padding of groups, with constants where the width of x is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from qalora_compile.errors import UnsupportedError
from qalora_compile.exporters.openvino.library import operators


def emit_pad_groups(context: Any) -> Any:
    """The outputs of `qalora.pad_groups`: zeros after x `[.., K]`, then after each group.

    Raises:
        UnsupportedError: the number of axes of x is not known.
    """
    op = operators()
    x = context.get_input(0)
    group, width = (int(context.get_values_from_const_input(index)) for index in (1, 2))
    shape = x.get_partial_shape()
    if shape.rank.is_dynamic:
        raise UnsupportedError("the input of a padded layer has an unknown number of axes")
    rank = shape.rank.get_length()
    last = shape[rank - 1]
    if last.is_static:
        tail = op.constant(np.array([-last.get_length() % group], np.int64))
    else:
        k = op.gather(op.shape_of(x, "i64"), np.array([-1]), np.int64(0))
        tail = op.floor_mod(op.negative(k), np.array([group], np.int64))
    padded = x if last.is_static and not last.get_length() % group else _pad(x, rank, tail)
    if width != group:
        lead = [0] * (rank - 1)  # kept as they are
        grouped = op.reshape(padded, np.array([*lead, -1, group]), True)
        wider = _pad(grouped, rank + 1, op.constant(np.array([width - group], np.int64)))
        padded = op.reshape(wider, np.array([*lead, -1]), True)
    return [padded] if padded is x else padded.outputs()


def _pad(x: Any, rank: int, end: Any) -> Any:
    """Zeros at the end of the last axis."""
    op = operators()
    begin, lead = np.zeros(rank, np.int64), np.zeros(rank - 1, np.int64)
    if end.get_type_name() == "Constant":
        ends = op.constant(np.concatenate([lead, end.data.astype(np.int64)]))
    else:
        ends = op.concat([op.constant(lead), end], 0)
    return op.pad(x, begin, ends, "constant", np.float32(0))
