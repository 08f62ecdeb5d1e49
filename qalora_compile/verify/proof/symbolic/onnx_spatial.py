"""ONNX's convolutions, pooling and norms over channels, by the standard's definitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qalora_compile.verify.proof.symbolic import convolution as c
from qalora_compile.verify.proof.symbolic import sums
from qalora_compile.verify.proof.symbolic import tensor as t
from qalora_compile.verify.proof.symbolic.expression import number
from qalora_compile.verify.proof.symbolic.operators import element_of
from qalora_compile.verify.proof.symbolic.tensor import Tensor, UnprovableError

Inputs = Sequence[Any]
Options = Mapping[str, Any]
Declare = Callable[..., Callable[[Callable[[Inputs, Options], Any]], Any]]
_WINDOW = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


def _window(options: Options, sizes: Sequence[int]) -> c.Window:
    axes = len(sizes)
    if options.get("auto_pad", "NOTSET") not in ("NOTSET", b"NOTSET"):
        raise UnprovableError("padding that depends on the size")
    if tuple(options.get("kernel_shape", sizes)) != tuple(sizes):
        raise UnprovableError("the kernel has another size than it states")
    pads = tuple(options.get("pads", (0,) * 2 * axes))
    strides = tuple(options.get("strides", (1,) * axes))
    dilations = tuple(options.get("dilations", (1,) * axes))
    return c.Window(tuple(sizes), strides, pads[:axes], pads[axes:], dilations)


def _conv(x: Inputs, options: Options) -> Tensor:
    value, weight, bias = x
    window = _window(options, c.kernel_sizes(weight))
    return c.convolution(t.only_floats(value), weight, bias, window, options.get("group", 1))


def _pool_window(value: Tensor, options: Options) -> c.Window:
    sizes = options["kernel_shape"]
    if value.rank != len(sizes) + 2:
        raise UnprovableError("a kernel has another number of axes than its operand")
    return _window(options, sizes)


def _max_pool(x: Inputs, options: Options) -> Tensor:
    if options.get("ceil_mode", 0) or options.get("storage_order", 0):
        raise UnprovableError("a pooling whose last window is cut off")
    return c.max_pool(t.only_floats(x[0]), _pool_window(x[0], options))


def _average_pool(x: Inputs, options: Options) -> Tensor:
    if options.get("ceil_mode", 0):
        raise UnprovableError("a pooling whose last window is cut off")
    counted = bool(options.get("count_include_pad", 0))
    return c.average_pool(t.only_floats(x[0]), _pool_window(x[0], options), count_padding=counted)


def _global_average(x: Inputs, _: Options) -> Tensor:
    value = t.only_floats(x[0])
    return sums.reduced_over(value, range(2, value.rank), sums.mean, kept=True)


def _batch_norm(x: Inputs, options: Options) -> Tensor:
    value, weight, bias, center, spread = x
    if options.get("training_mode", 0):
        raise UnprovableError("a norm by the statistics of the batch")
    eps = number(options.get("epsilon", 1e-5))
    return c.batch_norm(t.only_floats(value), (weight, bias), (center, spread), eps)


def _instance_norm(x: Inputs, options: Options) -> Tensor:
    value, weight, bias = x
    channels = value.shape[1].constant
    if channels is None:
        raise UnprovableError("the number of channels is not known")
    eps = number(options.get("epsilon", 1e-5))
    return c.group_norm(t.only_floats(value), channels, weight, bias, eps)


def _group_norm(x: Inputs, options: Options) -> Tensor:
    value, weight, bias = x
    if options.get("stash_type", 1) != 1 or weight.shape[0] is not value.shape[1]:
        raise UnprovableError("a norm in another precision, or with a scale for each group")
    eps = number(options.get("epsilon", 1e-5))
    return c.group_norm(t.only_floats(value), int(options["num_groups"]), weight, bias, eps)


def _pad(x: Inputs, options: Options) -> Tensor:
    value, pads, fill, axes = x
    if options.get("mode", "constant") not in ("constant", b"constant"):
        raise UnprovableError("padding by values of the tensor")
    numbers = [place.constant for place in t.integers(pads)]
    where = range(value.rank)
    along = where if axes is None else [value.axis(_known(a.constant)) for a in t.integers(axes)]
    before, behind = [0] * value.rank, [0] * value.rank
    for place, axis in enumerate(along):
        before[axis] = _known(numbers[place])
        behind[axis] = _known(numbers[place + len(numbers) // 2])
    outside = element_of(0, value.dtype) if fill is None else fill[()]
    return c.pad(value, before, behind, outside)


def _known(number_: int | None) -> int:
    if number_ is None:
        raise UnprovableError("the size of padding is not known")
    return number_


def declare(means: Declare) -> None:
    """Declare these operators by what `means` makes of a name, operands and attributes."""
    means("Conv", 3, *_WINDOW, "group")(_conv)
    means("MaxPool", 1, *_WINDOW, "ceil_mode", "storage_order")(_max_pool)
    means("AveragePool", 1, *_WINDOW, "ceil_mode", "count_include_pad")(_average_pool)
    means("GlobalAveragePool", 1)(_global_average)
    means("BatchNormalization", 5, "epsilon", "momentum", "training_mode")(_batch_norm)
    means("InstanceNormalization", 3, "epsilon")(_instance_norm)
    means("GroupNormalization", 3, "epsilon", "num_groups", "stash_type")(_group_norm)
    means("Pad", 4, "mode")(_pad)
