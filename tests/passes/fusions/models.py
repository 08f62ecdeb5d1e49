"""What the fusing passes look for, written out, each with one thing that may be odd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import qalora_compile as qc


def targets(program: qc.Program) -> list[object]:
    """What the nodes call."""
    return [node.target for node in program.graph.nodes]


class Norm(nn.Module):
    """A root-mean-square norm in one of the forms that models have, or nearly one."""

    def __init__(self, width: int, form: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.matrix = nn.Parameter(torch.randn(3, width))
        self.form, self.eps = form, eps

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        if self.form == "standard deviation":
            return self.weight * x * torch.rsqrt(x.var(-1, keepdim=True) + self.eps)
        mean = x.pow(2).mean(-1, keepdim=True) + self.eps
        if self.form == "gemma":
            return x * torch.pow(mean, -0.5) * (1.0 + self.weight)
        if self.form == "other axis":
            mean = x.pow(2).mean(1, keepdim=True) + self.eps
        if self.form == "cubed":
            mean = x.pow(3).mean(-1, keepdim=True).abs() + self.eps
        normed = (x + 1 if self.form == "other x" else x) * torch.rsqrt(mean)
        if self.form == "unweighted":
            return normed
        if self.form == "half":
            return self.weight.half() * normed.half()
        return (self.matrix if self.form == "matrix" else self.weight) * normed


class Rotated(nn.Module):
    """A rotary embedding of heads, or nearly one."""

    def __init__(self, odd: str = "", width: int = 8, part: int = 8) -> None:
        super().__init__()
        self.odd, self.width, self.part = odd, width, part
        self.frequency = nn.Buffer(torch.rand(part // 2))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `[B, S, H · D]`."""
        angle = positions[..., None] * self.frequency
        table = torch.cat([angle, angle if self.odd != "halves differ" else 2 * angle], -1)
        cos, sin = table.cos().unsqueeze(1), table.sin().unsqueeze(1)
        heads = x.unflatten(-1, (-1, self.width)).transpose(1, 2)
        complete, heads = heads, heads[..., : self.part]
        half = self.part // 2 + (self.odd == "unequal parts")
        first, second = heads[..., :half], heads[..., half:]
        crossed = torch.cat([second if self.odd == "no minus" else -second, first], -1)
        if self.odd == "neighbours":
            even, uneven = heads[..., ::2], heads[..., 1::2]
            crossed = torch.stack([-uneven, even], -1).flatten(-2)
        straight = heads.exp() if self.odd == "other x" else heads
        heads = straight * cos + crossed * sin
        if self.odd == "difference":
            heads = straight * cos - crossed * sin
        if self.part < self.width:
            rest = complete[..., self.part + (self.odd == "gap") :]
            heads = torch.cat([heads, rest], -1)
        return heads.transpose(1, 2).flatten(-2)


class Attending(nn.Module):
    """Attention over itself, heads shared or not."""

    def __init__(self, shared: int = 1, **options: Any) -> None:
        super().__init__()
        self.shared, self.options = shared, options

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend with x as query, key and value."""
        q = x.unflatten(-1, (-1, 4)).transpose(1, 2)
        k = v = q[:, :: self.shared]
        if self.shared > 1:
            b, h, t, d = k.shape
            k = v = k[:, :, None].expand(b, h, self.shared, t, d).reshape(b, -1, t, d)
        y = functional.scaled_dot_product_attention(
            q, k, v, None if self.options else mask, **self.options
        )
        return y.transpose(1, 2).reshape(*x.shape[:2], -1)


class Biased(nn.Module):
    """Attention of four heads, two of keys, with a mask of some shape."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend with x as query, key and value."""
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        k = v = q[:, ::2]
        y = functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return y.transpose(1, 2).flatten(-2)


class Summed(nn.Module):
    """A norm of a sum, or nearly one."""

    def __init__(self, odd: str = "") -> None:
        super().__init__()
        self.odd, self.norm, self.layer = odd, Norm(8, "llama"), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + y, and the sum."""
        if self.odd == "broadcast":
            y = y[:, :1]
        total = torch.add(x, y, alpha=2) if self.odd == "factor" else x + y
        if self.odd == "two axes":
            total = x.flatten(0, 1) + y.flatten(0, 1)
        early = total.cos() if self.odd == "read before" else torch.zeros(())
        if self.odd == "flattened":
            return self.norm(total.flatten(0, 1)), total
        return self.norm(total) + early, total
