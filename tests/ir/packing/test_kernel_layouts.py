"""Packed codes of GroupQuantLinear, bit by bit as docs/reference/operators.md says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qalora_compile.errors import UserInputError
from qalora_compile.ir.packing.kernel_layouts import pack_groups, unpack_groups

LAYOUTS = {
    "bits": st.sampled_from([2, 3, 4, 8]),
    "group_size": st.integers(1, 12).map(lambda n: 16 * n),
    "k": st.integers(1, 700),
    "seed": st.integers(0, 99),
}


def random_codes(bits: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (3, k), generator=generator, dtype=torch.uint8)


def read_code(row: list[int], bits: int, padded: int, k: int) -> int:
    """Code k of a row of bytes, from the written rule."""

    def bit(position: int) -> int:
        return row[position // 8] >> (position % 8) & 1

    if bits != 3:
        return sum(bit(k * bits + i) << i for i in range(bits))
    low_bytes = padded // 4
    byte, field = divmod(k, 4)
    unit = byte // 64
    size = min(64, low_bytes - 64 * unit)
    start = 8 * low_bytes + 256 * unit
    return bit(2 * k) | bit(2 * k + 1) << 1 | bit(start + field * size + byte % 64) << 2


@given(**LAYOUTS)
def test_every_code_is_where_the_specification_says(
    bits: int, group_size: int, k: int, seed: int
) -> None:
    codes = random_codes(bits, k, seed)
    packed = pack_groups(codes, bits=bits, group_size=group_size)
    groups = -(-k // group_size)
    assert packed.shape == (3, groups, group_size * bits // 8)
    for n in range(3):
        row = packed[n].flatten().tolist()
        found = [read_code(row, bits, groups * group_size, i) for i in range(groups * group_size)]
        assert found == codes[n].tolist() + [0] * (groups * group_size - k)


@given(**LAYOUTS)
def test_unpacking_undoes_packing(bits: int, group_size: int, k: int, seed: int) -> None:
    codes = random_codes(bits, k, seed)
    packed = pack_groups(codes, bits=bits, group_size=group_size)
    assert torch.equal(unpack_groups(packed, bits=bits, group_size=group_size, k=k), codes)


@pytest.mark.parametrize(("bits", "group_size"), [(5, 32), (4, 24), (4, 0), (1, 16)])
def test_what_the_operator_does_not_take_is_refused(bits: int, group_size: int) -> None:
    with pytest.raises(UserInputError, match="has no"):
        pack_groups(random_codes(1, 8, 0), bits=bits, group_size=group_size)
