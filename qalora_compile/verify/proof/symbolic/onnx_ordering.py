"""ONNX's operators that order and scatter elements, and its recurrences."""

from __future__ import annotations

from functools import partial

from qalora_compile.verify.proof.symbolic import ordering, recurrent
from qalora_compile.verify.proof.symbolic import tensor as t
from qalora_compile.verify.proof.symbolic.onnx_spatial import Declare, Inputs, Options
from qalora_compile.verify.proof.symbolic.tensor import Tensor, UnprovableError

_RECURRENT = ("direction", "hidden_size", "layout")


def _topk(x: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    if options.get("sorted", 1) != 1:
        raise UnprovableError("an order that is not known")
    (k,) = t.integers(x[1])
    largest = bool(options.get("largest", 1))
    return ordering.topk(x[0], k, options.get("axis", -1), largest=largest)


def _scatter(x: Inputs, options: Options) -> Tensor:
    value, places, written = x
    if options.get("reduction", "none") != "none" or value.rank != 1:
        raise UnprovableError("elements are combined, or written along several axes")
    if value.shape != written.shape:
        raise UnprovableError("elements are written at some places only")
    return ordering.inverse_order(t.squeeze(places, [-1]), written)


def _scatter_elements(x: Inputs, options: Options) -> Tensor:
    if options.get("reduction", "none") != "none":
        raise UnprovableError("elements are combined")
    return ordering.scattered(x[0], options.get("axis", 0), x[1], x[2])


def _argmax(x: Inputs, options: Options) -> Tensor:
    if options.get("select_last_index", 0):
        raise UnprovableError("the last of equal numbers")
    kept = bool(options.get("keepdims", 1))
    return ordering.argmax(x[0], options.get("axis", 0), kept=kept)


def declare(means: Declare) -> None:
    """Declare these operators by what `means` makes of a name, operands and attributes."""
    means("TopK", 2, "axis", "largest", "sorted")(_topk)
    means("ScatterND", 3, "reduction")(_scatter)
    means("ScatterElements", 3, "axis", "reduction")(_scatter_elements)
    means("ArgMax", 1, "axis", "keepdims", "select_last_index")(_argmax)
    lstm, gru = (partial(recurrent.onnx_recurrence, kind) for kind in ("LSTM", "GRU"))
    means("LSTM", 8, *_RECURRENT, "input_forget")(lstm)
    means("GRU", 6, *_RECURRENT, "linear_before_reset")(gru)
