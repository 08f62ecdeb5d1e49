"""ATen's operators that only change indices: views, slices, concatenations and lookups."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from qalora_compile.verify.proof.symbolic import operators as o
from qalora_compile.verify.proof.symbolic import tensor as t
from qalora_compile.verify.proof.symbolic.expression import integer
from qalora_compile.verify.proof.symbolic.operator_table import (
    Arguments,
    OperatorTable,
    size_of,
    sizes_of,
    tensor_of,
)
from qalora_compile.verify.proof.symbolic.polynomial import Poly, as_poly
from qalora_compile.verify.proof.symbolic.tensor import Tensor, UnprovableError

LAYOUT = OperatorTable()
_means = LAYOUT.means


@_means(
    "aten.contiguous.default aten.clone.default aten.alias.default aten.detach.default "
    "aten.lift_fresh_copy.default",
    "self",
)
def _same(a: Arguments) -> Tensor:
    return tensor_of(a["self"])


@_means("aten.view.default aten.reshape.default aten._unsafe_view.default", "self size")
def _view(a: Arguments) -> Tensor:
    return t.reshape(a["self"], sizes_of(a["size"]))


@_means("aten.flatten.using_ints", "self start_dim end_dim")
def _flatten(a: Arguments) -> Tensor:
    value = a["self"]
    first, last = value.axis(a.get("start_dim", 0)), value.axis(a.get("end_dim", -1))
    middle = t.product_of(value.shape[first : last + 1])
    return t.reshape(value, (*value.shape[:first], middle, *value.shape[last + 1 :]))


@_means("aten.reshape_as.default aten.view_as.default", "self other")
def _reshape_as(a: Arguments) -> Tensor:
    return t.reshape(a["self"], a["other"].shape)


@_means("aten.unflatten.int", "self dim sizes")
def _unflatten(a: Arguments) -> Tensor:
    value = a["self"]
    axis = value.axis(a["dim"])
    return t.reshape(value, (*value.shape[:axis], *sizes_of(a["sizes"]), *value.shape[axis + 1 :]))


@_means("aten.transpose.int", "self dim0 dim1")
def _transpose(a: Arguments) -> Tensor:
    value = a["self"]
    one, other = value.axis(a["dim0"]), value.axis(a["dim1"])
    axes = list(range(value.rank))
    axes[one], axes[other] = axes[other], axes[one]
    return t.transpose(value, axes)


@_means("aten.t.default", "self")
def _t(a: Arguments) -> Tensor:
    return t.transpose(a["self"], (1, 0))


@_means("aten.movedim.int", "self source destination")
def _movedim(a: Arguments) -> Tensor:
    value = a["self"]
    source, target = value.axis(a["source"]), value.axis(a["destination"])
    axes = [axis for axis in range(value.rank) if axis != source]
    axes.insert(target, source)
    return t.transpose(value, axes)


@_means("aten.permute.default", "self dims")
def _permute(a: Arguments) -> Tensor:
    return t.transpose(a["self"], a["dims"])


@_means("aten.unsqueeze.default", "self dim")
def _unsqueeze(a: Arguments) -> Tensor:
    return t.unsqueeze(a["self"], [a["dim"]])


@_means("aten.squeeze.dim", "self dim")
def _squeeze(a: Arguments) -> Tensor:
    return t.squeeze(a["self"], [a["dim"]])


@_means("aten.expand.default", "self size")
def _expand(a: Arguments) -> Tensor:
    value, size = a["self"], sizes_of(a["size"])
    added = len(size) - value.rank
    shape = [value.shape[i - added] if s.constant == -1 else s for i, s in enumerate(size)]
    found = t.expand(value, tuple(shape))
    if found.shape != tuple(shape):
        raise UnprovableError("an axis is expanded to size 1")
    return found


@_means("aten.slice.Tensor", "self dim start end step")
def _slice(a: Arguments) -> Tensor:
    start, end = a.get("start"), a.get("end")
    step = a.get("step", 1)
    if not isinstance(step, int):
        raise UnprovableError("the step of a slice")
    first = as_poly(0) if start is None else size_of(start)
    return t.cut(a["self"], a.get("dim", 0), first, None if end is None else size_of(end), step)


@_means("aten.select.int", "self dim index")
def _select(a: Arguments) -> Tensor:
    return t.gather(a["self"], a["dim"], t.scalar(integer(size_of(a["index"])), t.INT))


@_means("aten.cat.default", "tensors dim")
def _cat(a: Arguments) -> Tensor:
    return t.concatenate([tensor_of(v) for v in a["tensors"]], a.get("dim", 0))


@_means("aten.stack.default", "tensors dim")
def _stack(a: Arguments) -> Tensor:
    axis = a.get("dim", 0)
    return t.concatenate([t.unsqueeze(tensor_of(v), [axis]) for v in a["tensors"]], axis)


@_means("aten.split_with_sizes.default", "self split_sizes dim")
def _split_with_sizes(a: Arguments) -> tuple[Tensor, ...]:
    return _parts(a["self"], sizes_of(a["split_sizes"]), a.get("dim", 0))


@_means("aten.split.Tensor", "self split_size dim")
def _split(a: Arguments) -> tuple[Tensor, ...]:
    value, axis, step = a["self"], a.get("dim", 0), a["split_size"]
    size = value.shape[value.axis(axis)].constant
    if size is None or not isinstance(step, int) or size % step:
        raise UnprovableError("the parts of a split have no known sizes")
    return _parts(value, [as_poly(step)] * (size // step), axis)


@_means("aten.chunk.default", "self chunks dim")
def _chunk(a: Arguments) -> tuple[Tensor, ...]:
    value, axis, number_of = a["self"], a.get("dim", 0), a["chunks"]
    size = value.shape[value.axis(axis)].constant
    if size is None or size % number_of:
        raise UnprovableError("the parts of a split have no known sizes")
    return _parts(value, [as_poly(size // number_of)] * number_of, axis)


def _parts(value: Tensor, lengths: Sequence[Poly], axis: int) -> tuple[Tensor, ...]:
    places = [as_poly(0)]
    for length in lengths:
        places.append(places[-1] + length)
    if places[-1] is not value.shape[value.axis(axis)]:
        raise UnprovableError("the parts of a split do not add up to its axis")
    return tuple(t.cut(value, axis, first, last) for first, last in pairwise(places))


@_means("aten.repeat_interleave.self_int", "self repeats dim output_size")
def _repeat_interleave(a: Arguments) -> Tensor:
    value, times = a["self"], a["repeats"]
    if not isinstance(times, int) or times < 1 or a.get("dim") is None:
        raise UnprovableError("the number of repeats is not known")
    axis = value.axis(a["dim"])
    size = value.shape[axis]
    longer = t.unsqueeze(value, [axis + 1])
    shape = (*value.shape[: axis + 1], as_poly(times), *value.shape[axis + 1 :])
    flat = (*value.shape[:axis], size * times, *value.shape[axis + 1 :])
    return t.reshape(t.expand(longer, shape), flat)


@_means("aten.unbind.int", "self dim")
def _unbind(a: Arguments) -> tuple[Tensor, ...]:
    value, axis = a["self"], a.get("dim", 0)
    count = value.shape[value.axis(axis)].constant
    if count is None:
        raise UnprovableError("the number of parts is not known")
    places = (t.scalar(integer(place), t.INT) for place in range(count))
    return tuple(t.gather(value, axis, place) for place in places)


@_means("_operator.getitem", "a b")
def _getitem(a: Arguments) -> Any:
    return a["a"][a["b"]]


@_means("aten.index_select.default", "self dim index")
def _index_select(a: Arguments) -> Tensor:
    return t.gather(a["self"], a["dim"], a["index"])


@_means("aten.gather.default", "self dim index sparse_grad")
def _gather(a: Arguments) -> Tensor:
    return t.gather_elements(a["self"], a["dim"], a["index"])


@_means("aten.index.Tensor", "self indices")
def _index(a: Arguments) -> Tensor:
    places = list(a["indices"])
    if any(p is None or p.dtype != t.INT for p in places):
        raise UnprovableError("an axis is not indexed by integers")
    return o.lookup(a["self"], places)
