"""The operators of single targets: registered soundly, and right against plain numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qalora_compile.ir.ops import target_kernels
from qalora_compile.ir.packing.bitstream import pack_codes
from qalora_compile.ir.packing.kernel_layouts import pack_groups
from tests.models import assert_close

Q = torch.ops.qalora
N, K, E = 5, 48, 3


def codes_of(bits: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (N, k), generator=generator, dtype=torch.uint8)


def group_parts(bits: int, k: int = K, seed: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
    """codes, scale and zero-point in groups of 16, and W."""
    codes, groups = codes_of(bits, k, seed), -(-k // 16)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(N, groups, generator=generator)
    zero = 9 * torch.rand(N, groups, generator=generator)
    expanded = [t.repeat_interleave(16, 1)[:, :k] for t in (scale, zero)]
    packed = pack_groups(codes, bits=bits, group_size=16)
    return (packed, scale, zero), expanded[0] * (codes - expanded[1])


def block_parts(bits: int, k: int = K, seed: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same with integer zero-points, as one stream, and W."""
    codes, blocks = codes_of(bits, k, seed).t(), -(-k // 16)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(blocks, N, generator=generator)
    zero = torch.randint(0, 2**bits, (blocks, N), generator=generator, dtype=torch.uint8)
    expanded = [t.repeat_interleave(16, 0)[:k] for t in (scale, zero)]
    flat = [
        pack_codes(t.reshape(1, -1), bits)[0, : -(-t.numel() * bits // 8)].clone()
        for t in (codes, zero)
    ]
    return (flat[0], scale, flat[1]), (expanded[0] * (codes.int() - expanded[1].int())).t()


def stacked(make: Any, bits: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    each = [make(bits, K, seed) for seed in range(E)]
    return [list(t) for t in zip(*(parts for parts, _ in each), strict=True)], [w for _, w in each]


ENDS = torch.tensor([2, 2, 7], dtype=torch.int32)
CORRECTION = [torch.randn(K // 16, N, generator=torch.Generator().manual_seed(e)) for e in range(E)]
CHECKED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    **{
        f"group_quant_linear, {bits} bits": (
            Q.group_quant_linear,
            (torch.randn(2, 3, K), *group_parts(bits)[0], bits, 16, "fp32"),
        )
        for bits in (2, 3, 4, 8)
    },
    **{
        f"matmul_blocks, {bits} bits": (
            Q.matmul_blocks,
            (torch.randn(2, 3, K), *block_parts(bits)[0], bits, 16),
        )
        for bits in (2, 4, 8)
    },
    "expert_group_quant_linear": (
        Q.expert_group_quant_linear,
        (torch.randn(8, K), *stacked(group_parts, 4)[0], ENDS, 4, 16, "int8"),
    ),
    "expert_matmul_blocks": (
        Q.expert_matmul_blocks,
        (
            torch.randn(8, K),
            torch.randn(8, K // 16),
            *stacked(block_parts, 4)[0],
            CORRECTION,
            ENDS,
            4,
            16,
        ),
    ),
    "expert_matmul_blocks, its own rows": (
        Q.expert_matmul_blocks,
        (torch.randn(E, 2, K), None, *stacked(block_parts, 4)[0], [], None, 4, 16),
    ),
}


@pytest.mark.parametrize("kind", CHECKED)
def test_opcheck(kind: str) -> None:
    op, arguments = CHECKED[kind]
    assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    defined = {
        name
        for name, value in vars(target_kernels).items()
        if isinstance(value, torch._library.custom_ops.CustomOpDef)
    }
    assert {str(op).rpartition(".")[2] for op, _ in CHECKED.values()} == defined


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [48, 41])
def test_layers_against_plain_numbers(bits: int, k: int) -> None:
    x = torch.randn(3, k)
    parts, weight = group_parts(bits, k)
    y = Q.group_quant_linear(x, *parts, bits, 16, "fp32")
    assert_close(y, x @ weight.t(), relative=1e-6)
    if bits != 3:
        parts, weight = block_parts(bits, k)
        assert_close(Q.matmul_blocks(x, *parts, bits, 16), x @ weight.t(), relative=1e-6)


def test_experts_against_plain_numbers() -> None:
    x, sums = torch.randn(8, K), torch.randn(8, K // 16)
    rows = [slice(0, 2), slice(2, 2), slice(2, 7)]
    lists, weights = stacked(group_parts, 3)
    expected = torch.zeros(8, N)
    for expert, own in enumerate(rows):
        expected[own] = x[own] @ weights[expert].t()
    y = Q.expert_group_quant_linear(x, *lists, ENDS, 3, 16, "fp32")
    assert_close(y, expected, relative=1e-6)
    lists, weights = stacked(block_parts, 4)
    for expert, own in enumerate(rows):
        expected[own] = x[own] @ weights[expert].t() + sums[own] @ CORRECTION[expert]
    y = Q.expert_matmul_blocks(x, sums, *lists, CORRECTION, ENDS, 4, 16)
    assert_close(y, expected, relative=1e-6)
