"""Lookups on codes: registered soundly, and right against plain numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qalora_compile.ir.ops import embedding
from qalora_compile.ir.packing.bitstream import pack_codes
from tests.ir.ops.test_target_kernels import N, block_parts, group_parts
from tests.models import assert_close

Q = torch.ops.qalora
IDS = torch.tensor([[4, 0, 2], [1, 1, 3]])


def codes_parts(bits: int, k: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Packed codes, scale and offset in groups of 16, and W."""
    (_, scale, zero), weight = group_parts(bits, k)
    expanded = [t.repeat_interleave(16, 1)[:, :k] for t in (scale, zero)]
    codes = (weight / expanded[0] + expanded[1]).round().to(torch.uint8)
    return (pack_codes(codes, bits), scale, -scale * zero), weight


def nbits_parts(bits: int, k: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Codes as MatMulNBits has them, with packed integer zero-points, and W."""
    (codes, scale, zero), _ = group_parts(bits, k)
    near = zero.round().to(torch.uint8)
    packed = pack_codes(near, bits)[:, : -(-near.shape[1] * bits // 8)].contiguous()
    (_, _, _), weight = group_parts(bits, k)
    return (codes, scale, packed), weight + (scale * (zero - near)).repeat_interleave(16, 1)[:, :k]


CHECKED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "group_embedding": (
        Q.group_embedding,
        (IDS, *codes_parts(4, 41)[0], torch.bfloat16, 4, 16, 41),
    ),
    "block_embedding, real zero-points": (
        Q.block_embedding,
        (IDS, *group_parts(8, 41)[0], 8, 16, 41),
    ),
    "block_embedding, integer zero-points": (
        Q.block_embedding,
        (IDS, *nbits_parts(4, 41)[0], 4, 16, 41),
    ),
    "flat_embedding": (Q.flat_embedding, (IDS, *block_parts(4, 41)[0], 4, 16, 41)),
}


@pytest.mark.parametrize("kind", CHECKED)
def test_opcheck(kind: str) -> None:
    op, arguments = CHECKED[kind]
    assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    defined = {
        name
        for name, value in vars(embedding).items()
        if isinstance(value, torch._library.custom_ops.CustomOpDef)
    }
    assert {str(op).rpartition(".")[2] for op, _ in CHECKED.values()} == defined


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [48, 41, 7])
@pytest.mark.parametrize(
    "ids", [IDS, IDS[0], IDS[0, 0], IDS[:0]], ids=["2-D", "1-D", "one", "none"]
)
def test_rows_are_those_of_the_weight(bits: int, k: int, ids: Tensor) -> None:
    parts, weight = codes_parts(bits, k)
    found = Q.group_embedding(ids, *parts, torch.float32, bits, 16, k)
    assert_rows(found, ids, weight)
    for make in (group_parts, nbits_parts):
        parts, weight = make(bits, k)
        assert_rows(Q.block_embedding(ids, *parts, bits, 16, k), ids, weight)
    parts, weight = block_parts(bits, k)
    assert_rows(Q.flat_embedding(ids, *parts, bits, 16, k), ids, weight)


def assert_rows(found: Tensor, ids: Tensor, weight: Tensor) -> None:
    assert weight.shape[0] == N
    expected = functional.embedding(ids, weight)
    assert found.shape == expected.shape
    if ids.numel():
        assert_close(found, expected, relative=1e-6)
