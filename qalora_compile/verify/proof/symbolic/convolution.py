"""Convolutions, pooling and norms over space, as sums and maxima over bound indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qalora_compile.verify.proof.symbolic.arithmetic import holds, quotient
from qalora_compile.verify.proof.symbolic.expression import (
    FALSE,
    INFINITE,
    TRUE,
    ZERO,
    Expr,
    add,
    both,
    function,
    inverse,
    linear,
    mul,
    number,
    where,
)
from qalora_compile.verify.proof.symbolic.operators import difference, product, total
from qalora_compile.verify.proof.symbolic.polynomial import Poly, as_poly
from qalora_compile.verify.proof.symbolic.sums import largest, mean, summed
from qalora_compile.verify.proof.symbolic.tensor import (
    FLOAT,
    ONE_ELEMENT,
    Index,
    Shape,
    Tensor,
    UnprovableError,
    elementwise,
    reshape,
)


@dataclass(frozen=True)
class Window:
    """How a kernel moves along the axes of space, one number for each.

    Attributes:
        sizes: Of the kernel.
        strides: Steps between its places.
        before: Padding before the first element.
        behind: Padding behind the last one.
        dilations: Steps between its elements.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    before: tuple[int, ...]
    behind: tuple[int, ...]
    dilations: tuple[int, ...]

    def __post_init__(self) -> None:
        fields = (self.sizes, self.strides, self.before, self.behind, self.dilations)
        if len({len(field) for field in fields}) != 1:
            raise UnprovableError("a kernel has another number of axes than its steps or padding")
        if min(*self.sizes, *self.strides, *self.dilations) < 1:
            raise UnprovableError("a kernel has a size or step below 1")
        if min(*self.before, *self.behind) < 0:
            raise UnprovableError("padding is negative")

    def shape(self, space: Shape) -> Shape:
        """The number of its places along each axis; those that do not fit are left out."""
        if len(space) != len(self.sizes):
            raise UnprovableError("a kernel has another number of axes than its operand")
        found = []
        for axis, size in enumerate(space):
            room = size + self.before[axis] + self.behind[axis]
            last = room - self.dilations[axis] * (self.sizes[axis] - 1) - 1
            if last.constant is not None and last.constant < 0:
                raise UnprovableError("a kernel is longer than its operand")
            found.append(quotient(last, as_poly(self.strides[axis])) + 1)
        return tuple(found)

    def place(self, axis: int, at: Poly, inside: Poly) -> Poly:
        """The element under one of the kernel's; in the padding, it is outside of the axis."""
        return at * self.strides[axis] - self.before[axis] + inside * self.dilations[axis]

    @property
    def padded(self) -> bool:
        """Whether it has any padding."""
        return any((*self.before, *self.behind))


def kernel_sizes(weight: Tensor) -> tuple[int, ...]:
    """The sizes of a kernel `[O, C, …]` along the axes of space.

    Raises:
        UnprovableError: one is not known.
    """
    found = [size.constant for size in weight.shape[2:]]
    if None in found:
        raise UnprovableError("the size of a kernel is not known")
    return tuple(size for size in found if size is not None)


def padded(places: Sequence[Poly], space: Shape, inside: Callable[[], Expr], outside: Expr) -> Expr:
    """An element, or what padding has in its place."""
    within = TRUE
    for place, size in zip(places, space, strict=True):
        within = both(within, both(linear(place), linear(size - 1 - place)))
    return outside if within is FALSE else where(within, inside(), outside)


def _over(
    sizes: Sequence[int], body: Callable[[Index], Expr], reduce: Callable[..., Expr] = summed
) -> Expr:
    """The sum, or another reduction, over all elements of a kernel."""

    def along(chosen: Index) -> Expr:
        if len(chosen) == len(sizes):
            return body(chosen)
        return reduce(as_poly(sizes[len(chosen)]), lambda i: along((*chosen, i)))

    return along(())


def convolution(
    value: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """`[N, C, …]` by `[O, C / groups, …]`: each output channel reads the channels of its group."""
    space = value.shape[2:]
    outputs, width = weight.shape[0].constant, weight.shape[1].constant
    if outputs is None or width is None or groups < 1 or outputs % groups:
        raise UnprovableError("the channels of a convolution do not fit its groups")
    if value.shape[1] is not as_poly(width * groups):
        raise UnprovableError("a convolution has another number of channels than its operand")
    if tuple(size.constant for size in weight.shape[2:]) != window.sizes:
        raise UnprovableError("the kernel of a convolution has another size than it states")
    shape = (value.shape[0], weight.shape[0], *window.shape(space))
    share = as_poly(outputs // groups)

    def element(index: Index) -> Expr:
        batch, channel, *at = index
        first = quotient(channel, share) * width

        def term(inside: Index) -> Expr:
            feature, *kernel = inside
            places = [window.place(i, at[i], k) for i, k in enumerate(kernel)]
            lead = (batch, first + feature)
            factor = weight[(channel, *inside)]
            return padded(places, space, lambda: mul(value[(*lead, *places)], factor), ZERO)

        return _over((width, *window.sizes), term)

    found = Tensor(shape, FLOAT, element)
    if bias is None:
        return found
    return total(found, reshape(bias, (weight.shape[0], *[ONE_ELEMENT] * len(space))))


def average_pool(value: Tensor, window: Window, *, count_padding: bool) -> Tensor:
    """The mean under each place of a kernel; padding counts as zeros, or not at all."""
    if window.padded and not count_padding:
        raise UnprovableError("a mean that leaves padding out")
    share = inverse(number(float(math.prod(window.sizes))))
    return elementwise(lambda x: mul(x, share), FLOAT, _pooled(value, window, ZERO, summed))


def max_pool(value: Tensor, window: Window) -> Tensor:
    """The largest element under each place of a kernel."""
    return _pooled(value, window, number(-INFINITE), largest)


def _pooled(value: Tensor, window: Window, outside: Expr, reduce: Callable[..., Expr]) -> Tensor:
    lead = value.rank - len(window.sizes)
    space = value.shape[lead:]

    def element(index: Index) -> Expr:
        def term(kernel: Index) -> Expr:
            places = [window.place(i, index[lead + i], k) for i, k in enumerate(kernel)]
            return padded(places, space, lambda: value[(*index[:lead], *places)], outside)

        return _over(window.sizes, term, reduce)

    return Tensor((*value.shape[:lead], *window.shape(space)), FLOAT, element)


def adaptive_window(space: Shape, sizes: Sequence[int]) -> Window:
    """The kernel of a pooling that is given the size of its result, which has to divide."""
    kernel = []
    for size, wanted in zip(space, sizes, strict=True):
        if size.constant is None or wanted < 1 or size.constant % wanted:
            raise UnprovableError("a pooling of parts that are not known to have one size")
        kernel.append(size.constant // wanted)
    none, ones = (0,) * len(kernel), (1,) * len(kernel)
    return Window(tuple(kernel), tuple(kernel), none, none, ones)


def pad(value: Tensor, before: Sequence[int], behind: Sequence[int], fill: Expr) -> Tensor:
    """A tensor with elements of one value around it; negative numbers cut elements off."""
    pairs = list(zip(value.shape, before, behind, strict=True))
    shape = tuple(size + low + high for size, low, high in pairs)
    if not all(holds(size) for size in shape):
        raise UnprovableError("padding cuts more elements off than there are")

    def element(index: Index) -> Expr:
        places = [place - low for place, (_, low, _) in zip(index, pairs, strict=True)]
        return padded(places, value.shape, lambda: value[tuple(places)], fill)

    return Tensor(shape, value.dtype, element)


def along_channels(value: Tensor, vector: Tensor) -> Tensor:
    """A vector with one number for each channel, to be broadcast to `[N, C, …]`."""
    return reshape(vector, (value.shape[1], *[ONE_ELEMENT] * (value.rank - 2)))


def _normed(value: Tensor, center: Tensor, spread: Tensor, eps: Expr) -> Tensor:
    scale = elementwise(lambda v: inverse(function("sqrt", add(v, eps))), FLOAT, spread)
    return product(difference(value, center), scale)


def scaled_channels(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Each channel times a weight, plus a bias."""
    if weight is not None:
        value = product(value, along_channels(value, weight))
    return value if bias is None else total(value, along_channels(value, bias))


def batch_norm(
    value: Tensor,
    parameters: tuple[Tensor | None, Tensor | None],
    statistics: tuple[Tensor, Tensor],
    eps: Expr,
) -> Tensor:
    """(x - mean) / √(variance + eps) · weight + bias, by statistics that are stored."""
    center, spread = (along_channels(value, s) for s in statistics)
    return scaled_channels(_normed(value, center, spread, eps), *parameters)


def group_norm(
    value: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: Expr
) -> Tensor:
    """A norm over the channels of each group and over space, then a weight for each channel."""
    flat = reshape(value, (value.shape[0], as_poly(groups), as_poly(-1)))
    center = mean(flat, -1, kept=True)
    shifted = difference(flat, center)
    spread = mean(product(shifted, shifted), -1, kept=True)
    return scaled_channels(reshape(_normed(flat, center, spread, eps), value.shape), weight, bias)
