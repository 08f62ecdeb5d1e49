"""Packed codes: round trips, and the exact bytes against a bit stream written in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.config import SUPPORTED_BITS
from qalora_compile.ir.packing.bitstream import pack_codes, packed_width, unpack_codes, unpack_into

BITS = st.sampled_from(SUPPORTED_BITS)
SIZE = st.integers(1, 6)
WIDTH = st.integers(1, 70)


def random_codes(n: int, k: int, bits: int, seed: int) -> Tensor:
    """Codes over the full range of `bits`, the largest one included."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator).to(torch.uint8)
    codes[0, 0] = 2**bits - 1
    return codes


def stream_bytes(row: list[int], bits: int) -> bytes:
    """One row as a little-endian bit stream, padded to complete units of eight codes."""
    number = sum(code << (position * bits) for position, code in enumerate(row))
    return number.to_bytes((len(row) + 7) // 8 * bits, "little")


@given(n=SIZE, k=WIDTH, bits=BITS, seed=st.integers(0, 999))
def test_unpack_undoes_pack(n: int, k: int, bits: int, seed: int) -> None:
    codes = random_codes(n, k, bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert tuple(packed.shape) == (n, packed_width(k, bits))
    assert torch.equal(unpack_codes(packed, bits, k), codes)


@given(n=SIZE, k=WIDTH, bits=BITS, seed=st.integers(0, 999))
def test_bytes_equal_the_plain_bit_stream(n: int, k: int, bits: int, seed: int) -> None:
    codes = random_codes(n, k, bits, seed)
    expected = [list(stream_bytes(row, bits)) for row in codes.tolist()]
    assert pack_codes(codes, bits).tolist() == expected


def test_low_nibble_comes_first() -> None:
    packed = pack_codes(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8), 4)
    assert packed.tolist() == [[0x21, 0x43, 0x65, 0x87]]


def test_three_bit_codes_straddle_bytes() -> None:
    packed = pack_codes(torch.tensor([[7, 0, 5, 0, 0, 0, 0, 4]], dtype=torch.uint8), 3)
    assert packed.tolist() == [[0b01000111, 0b00000001, 0b10000000]]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_padding_codes_are_zero(bits: int) -> None:
    packed = pack_codes(torch.full((2, 3), 2**bits - 1, dtype=torch.uint8), bits)
    assert unpack_codes(packed, bits, 8)[:, 3:].tolist() == [[0] * 5] * 2


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_unpack_into_writes_the_asked_dtype(bits: int, dtype: torch.dtype) -> None:
    codes = random_codes(3, 21, bits, seed=1)
    wide = unpack_into(pack_codes(codes, bits), bits, dtype)
    assert wide.dtype == dtype
    assert wide.shape[1] == 24
    assert torch.equal(wide[:, :21].to(torch.uint8), codes)


def test_packing_leaves_its_input_alone() -> None:
    codes = random_codes(2, 8, 8, seed=2)
    packed = pack_codes(codes, 8)
    packed.zero_()
    assert int(codes.max()) == 255


@pytest.mark.parametrize(
    ("k", "bits", "width"), [(1, 2, 2), (8, 3, 3), (9, 3, 6), (17, 4, 12), (64, 8, 64)]
)
def test_packed_width(k: int, bits: int, width: int) -> None:
    assert packed_width(k, bits) == width
