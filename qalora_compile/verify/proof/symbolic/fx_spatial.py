"""ATen's convolutions, pooling and norms over channels."""

from __future__ import annotations

from typing import Any

from qalora_compile.verify.proof.symbolic import convolution as c
from qalora_compile.verify.proof.symbolic import operators as o
from qalora_compile.verify.proof.symbolic import sums
from qalora_compile.verify.proof.symbolic import tensor as t
from qalora_compile.verify.proof.symbolic.expression import number
from qalora_compile.verify.proof.symbolic.operator_table import Arguments, OperatorTable
from qalora_compile.verify.proof.symbolic.polynomial import as_poly
from qalora_compile.verify.proof.symbolic.tensor import Tensor, UnprovableError

SPATIAL = OperatorTable()
_means = SPATIAL.means
_CONVOLUTION = "input weight bias stride padding dilation groups"


def _numbers(value: Any, axes: int, default: int) -> tuple[int, ...]:
    """One number for each axis of space; one alone counts for all, an empty list is left out."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return (default,) * axes
    found = (value,) if isinstance(value, int) else tuple(value)
    found = found * axes if len(found) == 1 else found
    if len(found) != axes or not all(isinstance(n, int) for n in found):
        raise UnprovableError("the numbers of a kernel are not known")
    return found


@_means(" ".join(f"aten.conv{n}d.default aten.conv{n}d.padding" for n in (1, 2, 3)), _CONVOLUTION)
def _conv(a: Arguments) -> Tensor:
    value, weight = a["input"], a["weight"]
    sizes = c.kernel_sizes(weight)
    axes = len(sizes)
    steps = _numbers(a.get("dilation"), axes, 1)
    padding = a.get("padding")
    if padding == "same":
        missing = [step * (size - 1) for step, size in zip(steps, sizes, strict=True)]
        before = tuple(n // 2 for n in missing)
        behind = tuple(n - n // 2 for n in missing)
    else:
        before = behind = _numbers(None if padding == "valid" else padding, axes, 0)
    window = c.Window(sizes, _numbers(a.get("stride"), axes, 1), before, behind, steps)
    if padding == "same" and set(window.strides) != {1}:
        raise UnprovableError("padding to the same size with steps")
    if value.rank != axes + 2:
        raise UnprovableError("a convolution without an axis of a batch")
    return c.convolution(value, weight, a.get("bias"), window, a.get("groups", 1))


@_means(
    "aten.convolution.default",
    "input weight bias stride padding dilation transposed output_padding groups",
)
def _convolution(a: Arguments) -> Tensor:
    if a["transposed"] is not False:
        raise UnprovableError("a transposed convolution")
    found: Tensor = _conv(a)
    return found


def _pool_window(a: Arguments) -> c.Window:
    kernel = a["kernel_size"]
    axes = 1 if isinstance(kernel, int) else len(kernel)
    sizes = _numbers(kernel, axes, 1)
    if a.get("ceil_mode", False):
        raise UnprovableError("a pooling whose last window is cut off")
    stride = a.get("stride")
    strides = _numbers(stride, axes, 1) if stride else sizes
    padding = _numbers(a.get("padding"), axes, 0)
    return c.Window(sizes, strides, padding, padding, _numbers(a.get("dilation"), axes, 1))


@_means(
    "aten.max_pool1d.default aten.max_pool2d.default",
    "self kernel_size stride padding dilation ceil_mode",
)
def _max_pool(a: Arguments) -> Tensor:
    return c.max_pool(o.floating(a["self"]), _pool_window(a))


@_means(
    "aten.avg_pool1d.default aten.avg_pool2d.default",
    "self kernel_size stride padding ceil_mode count_include_pad divisor_override",
)
def _avg_pool(a: Arguments) -> Tensor:
    if a.get("divisor_override") is not None:
        raise UnprovableError("a mean with a divisor of its own")
    counted = bool(a.get("count_include_pad", True))
    return c.average_pool(o.floating(a["self"]), _pool_window(a), count_padding=counted)


@_means("aten.adaptive_avg_pool1d.default aten.adaptive_avg_pool2d.default", "self output_size")
def _adaptive_avg_pool(a: Arguments) -> Tensor:
    value, sizes = o.floating(a["self"]), tuple(a["output_size"])
    axes = range(-len(sizes), 0)
    if set(sizes) == {1}:
        return sums.reduced_over(value, axes, sums.mean, kept=True)
    window = c.adaptive_window(value.shape[value.rank - len(sizes) :], sizes)
    return c.average_pool(value, window, count_padding=True)


@_means(
    "aten.batch_norm.default",
    "input weight bias running_mean running_var training momentum eps cudnn_enabled",
)
def _batch_norm(a: Arguments) -> Tensor:
    if a.get("training") is not False:
        raise UnprovableError("a norm by the statistics of the batch")
    statistics = (a["running_mean"], a["running_var"])
    parameters = (a.get("weight"), a.get("bias"))
    return c.batch_norm(a["input"], parameters, statistics, number(a["eps"]))


@_means("aten.group_norm.default", "input num_groups weight bias eps cudnn_enabled")
def _group_norm(a: Arguments) -> Tensor:
    eps = number(a.get("eps", 1e-5))
    return c.group_norm(a["input"], a["num_groups"], a.get("weight"), a.get("bias"), eps)


@_means("aten.constant_pad_nd.default", "self pad value")
@_means("aten.pad.default", "self pad mode value")
def _pad(a: Arguments) -> Tensor:
    value = a["self"]
    if a.get("mode", "constant") != "constant":
        raise UnprovableError(f"padding by {a['mode']}")
    numbers = list(a["pad"])
    if not all(isinstance(n, int) for n in numbers) or len(numbers) % 2:
        raise UnprovableError("the size of padding is not known")
    rest = value.rank - len(numbers) // 2
    before = [*[0] * rest, *numbers[::2][::-1]]
    behind = [*[0] * rest, *numbers[1::2][::-1]]
    fill = o.element_of(a.get("value") or 0, value.dtype)
    return c.pad(value, before, behind, fill)


@_means("aten.glu.default", "self dim")
def _glu(a: Arguments) -> Tensor:
    value, axis = a["self"], a.get("dim", -1)
    size = value.shape[value.axis(axis)].constant
    if size is None or size % 2:
        raise UnprovableError("the halves of a gate are not known")
    half = as_poly(size // 2)
    one, other = t.cut(value, axis, as_poly(0), half), t.cut(value, axis, half, None)
    return o.product(one, o.unary("sigmoid")(other))


@_means("aten._weight_norm.default", "v g dim")
def _weight_norm(a: Arguments) -> Tensor:
    value, axis = a["v"], a["v"].axis(a.get("dim", 0))
    squares = o.product(value, value)
    others = [other for other in range(value.rank) if other != axis]
    length = o.unary("sqrt")(sums.reduced_over(squares, others, sums.total, kept=True))
    return o.product(value, o.divided(a["g"], length))
