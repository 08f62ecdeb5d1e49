"""`GroupAffine`: a weight matrix as unsigned codes with one scale and one offset per group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qalora_compile.config import SUPPORTED_BITS
from qalora_compile.errors import UserInputError
from qalora_compile.ir.lazy_tensor import holds
from qalora_compile.ir.packing.bitstream import pack_codes, unpack_into


def group_count(k: int, group_size: int) -> int:
    """L = ceil(K / g): how many groups a row of K weights has, a shorter tail group included."""
    return -(-k // group_size)


def expand_groups(values: Tensor, group_size: int, k: int) -> Tensor:
    """Repeat one value per group, `[.., L]`, for every weight of the group, `[.., K]`."""
    return values.repeat_interleave(group_size, dim=-1)[..., :k]


def sum_groups(x: Tensor, group_size: int) -> Tensor:
    """S(x): sums of x inside each group, `[.., K]` to `[.., L]`; the tail group may be shorter."""
    k = x.shape[-1]
    full = k // group_size * group_size
    sums: Tensor = x[..., :full].unflatten(-1, (full // group_size, group_size)).sum(-1)
    if full == k:
        return sums
    return torch.cat([sums, x[..., full:].sum(-1, keepdim=True)], dim=-1)


def has_integer_zero_points(scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Whether each zero-point −offset / scale is an integer from 0 to 2^bits − 1, as bool.

    A group of zeros, whose scale and offset are 0, has any.
    """
    ratio = -offset.double() / scale.double()
    integer: Tensor = (ratio == ratio.round()) & (ratio >= 0) & (ratio <= 2**bits - 1)
    return integer | ((scale == 0) & (offset == 0))


def dequantize(
    packed: Tensor, scale: Tensor, offset: Tensor, *, bits: int, group_size: int, k: int
) -> Tensor:
    """W = scale · q + offset from packed codes, in the dtype of `scale`: `[N, K]`.

    Args:
        packed: `[N, ceil(K / 8) · bits]` uint8, see `packing`.
        scale: `[N, L]` floating point.
        offset: `[N, L]`, as `scale`.
        bits: Width of a code.
        group_size: g.
        k: K, the row length.
    """
    weight = unpack_into(packed, bits, scale.dtype)[:, :k]
    full = k // group_size
    if full:
        body = weight[:, : full * group_size].unflatten(1, (full, group_size))
        body.mul_(scale[:, :full, None]).add_(offset[:, :full, None])
    if full * group_size < k:
        weight[:, full * group_size :].mul_(scale[:, full:]).add_(offset[:, full:])
    return weight


@dataclass(frozen=True)
class GroupAffine:
    """A quantized weight: `W = scale · codes + offset`, constant scale and offset in each group.

    The form needs no division, so a group of equal weights (scale 0) is legal and exact. The
    zero-point form `W = scale · (codes − zero_point)` is derived by whoever emits it.

    Invariants, checked by `validate`:
      * `codes`: uint8 `[N, K]`, N and K at least 1, every value below 2^bits;
      * `scale`, `offset`: `[N, L]`, L = ceil(K / group_size), one floating dtype, all finite;
      * `bits` in 2, 3, 4, 8; `group_size` at least 1.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def groups(self) -> int:
        """L."""
        return group_count(self.codes.shape[1], self.group_size)

    def validate(self) -> GroupAffine:
        """Check the invariants and return self.

        Raises:
            UserInputError: an invariant is broken.
        """
        if self.bits not in SUPPORTED_BITS or self.group_size < 1:
            raise UserInputError(
                f"bits {self.bits} and group_size {self.group_size} are not a legal pair",
                hint=f"bits: {SUPPORTED_BITS}; group_size: 1 or more",
            )
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8 or self.codes.numel() == 0:
            raise UserInputError(
                f"codes are {self.codes.dtype} {list(self.codes.shape)}, not uint8 [N, K]"
            )
        if self.bits < 8 and not holds((self.codes < 2**self.bits).all()):
            raise UserInputError(
                f"a code of {int(self.codes.max())} needs more than {self.bits} bits"
            )
        expected = (self.codes.shape[0], self.groups)
        for name, values in (("scale", self.scale), ("offset", self.offset)):
            if tuple(values.shape) != expected or not values.is_floating_point():
                raise UserInputError(
                    f"{name} is {values.dtype} {list(values.shape)}, not floating {list(expected)}",
                    hint="one value per row and group: [N, ceil(K / group_size)]",
                )
            if not holds(torch.isfinite(values).all()):
                raise UserInputError(f"{name} holds NaN or infinite values")
        if not holds(torch.isfinite(self.scale * (2**self.bits - 1)).all()):
            raise UserInputError(f"the range of a group does not fit {self.scale.dtype}")
        if self.scale.dtype != self.offset.dtype:
            raise UserInputError("scale and offset differ in dtype")
        return self

    def pack(self) -> Tensor:
        """The codes as a packed bit stream, `[N, ceil(K / 8) · bits]` uint8."""
        return pack_codes(self.codes, self.bits)

    def dequantize(self) -> Tensor:
        """W, `[N, K]`, in the dtype of `scale`."""
        k = self.codes.shape[1]
        return self.codes.to(self.scale.dtype) * expand_groups(
            self.scale, self.group_size, k
        ) + expand_groups(self.offset, self.group_size, k)

    def zero_point(self) -> Tensor:
        """−offset / scale, `[N, L]`, in code units and real-valued; 0 where the scale is 0."""
        safe = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        return torch.where(self.scale == 0, torch.zeros_like(self.scale), -self.offset / safe)
