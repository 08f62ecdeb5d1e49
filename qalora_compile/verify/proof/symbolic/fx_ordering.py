"""ATen's operators that order, count and scatter elements, and its recurrences."""

from __future__ import annotations

from functools import partial
from typing import Any

from qalora_compile.verify.proof.symbolic import operators as o
from qalora_compile.verify.proof.symbolic import ordering, recurrent
from qalora_compile.verify.proof.symbolic import tensor as t
from qalora_compile.verify.proof.symbolic.operator_table import Arguments, OperatorTable, size_of
from qalora_compile.verify.proof.symbolic.polynomial import as_poly
from qalora_compile.verify.proof.symbolic.tensor import Tensor, UnprovableError

ORDERING = OperatorTable()
_means = ORDERING.means


@_means("aten.topk.default", "self k dim largest sorted")
def _topk(a: Arguments) -> tuple[Tensor, Tensor]:
    if a.get("sorted", True) is not True:
        raise UnprovableError("an order that is not known")
    largest = bool(a.get("largest", True))
    return ordering.topk(a["self"], size_of(a["k"]), a.get("dim", -1), largest=largest)


@_means("aten.sort.default aten.sort.stable", "self dim descending stable")
def _sort(a: Arguments) -> tuple[Tensor, Tensor]:
    value, axis = a["self"], a.get("dim", -1)
    count = value.shape[value.axis(axis)]
    return ordering.topk(value, count, axis, largest=bool(a.get("descending", False)))


@_means("aten.argmax.default", "self dim keepdim")
def _argmax(a: Arguments) -> Tensor:
    value, axis = a["self"], a.get("dim")
    if axis is None:
        value, axis = t.reshape(value, (as_poly(-1),)), 0
    return ordering.argmax(value, axis, kept=bool(a.get("keepdim", False)))


@_means("aten.histc.default", "self bins min max")
def _histc(a: Arguments) -> Tensor:
    return ordering.counts_of(a["self"], a["bins"], a["min"], a["max"])


@_means("aten.scatter.src", "self dim index src")
def _scatter(a: Arguments) -> Tensor:
    return ordering.scattered(a["self"], a["dim"], a["index"], a["src"])


@_means("aten.empty_like.default", "self dtype")
def _empty_like(a: Arguments) -> Tensor:
    def element(_: Any) -> Any:
        raise UnprovableError("elements that nothing has written are read")

    return Tensor(a["self"].shape, o.kind_of(a.get("dtype") or a["self"].dtype), element)


@_means("aten.index_put.default", "self indices values accumulate")
def _index_put(a: Arguments) -> Tensor:
    if a.get("accumulate", False) or len(a["indices"]) != 1 or a["self"].rank != 1:
        raise UnprovableError("elements are added, or written along several axes")
    return ordering.inverse_order(a["indices"][0], a["values"])


_RECURRENCE = "has_biases num_layers dropout train bidirectional batch_first"
for _name, _kind in (("lstm", recurrent.LSTM), ("gru", recurrent.GRU)):
    _means(f"aten.{_name}.input", f"input hx params {_RECURRENCE}")(
        partial(recurrent.fx_recurrence, _kind)
    )
