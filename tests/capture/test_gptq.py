"""Layers of GPTQ and AWQ checkpoints: codes as they are, zero-points of both formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qalora_compile.capture.gptq import StoredFormat, read_layer
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.packing import unpack_codes
from tests.cli.conftest import data_file, model_folder  # noqa: F401 - fixtures

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def words_of(values: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[R, C]` as words `[R·bits/32, C]`, bit by bit: code r has bits r·b … of its column."""
    rows, columns = values.shape
    words = np.zeros((rows * bits // 32, columns), dtype=np.uint64)
    for row in range(rows):
        for bit in range(bits):
            place = row * bits + bit
            one = (values[row].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)
            words[place // 32] |= one << np.uint64(place % 32)
    return words.astype(np.uint32).view(np.int32)


def awq_words(values: np.ndarray) -> np.ndarray:
    """Codes `[R, C]` as words `[R, C/8]`: nibble i of a word is its column `AWQ_COLUMNS[i]`."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for nibble, column in enumerate(AWQ_COLUMNS):
        words |= values[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def layer(
    k: int, n: int, bits: int, group: int, *, method: str = "gptq", zero: int | None = None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The tensors of a layer (zero-points as in v2), its codes and its weight, both `[N, K]`."""
    rng = np.random.default_rng(k + n + bits)
    codes = rng.integers(0, 2**bits, (k, n))
    zeros = rng.integers(0, 2**bits, (-(-k // group), n))
    if zero is not None:
        zeros[:] = zero
    scales = rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    weight = (codes - zeros.repeat(group, 0)[:k]) * scales.repeat(group, 0)[:k].astype(np.float64)
    pack = (lambda v: words_of(v, bits)) if method == "gptq" else awq_words
    packed_zeros = words_of(zeros.T, bits).T if method == "gptq" else awq_words(zeros)
    parts = {"qweight": pack(codes), "qzeros": packed_zeros, "scales": scales}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in parts.items()}
    return tensors, torch.from_numpy(codes.T.copy()), torch.from_numpy(weight.T.copy())


def as_v1(tensors: dict[str, Tensor], bits: int, n: int) -> dict[str, Tensor]:
    """Zero-points less 1, as format v1 stores them."""
    v2 = unpack_codes(tensors["qzeros"].contiguous().view(torch.uint8), bits, n).numpy()
    less = ((v2.astype(np.int64) - 1) % 2**bits).T
    return tensors | {"qzeros": torch.from_numpy(np.ascontiguousarray(words_of(less, bits).T))}


def settings_of(method: str = "gptq", **more: Any) -> dict[str, Any]:
    own = {"desc_act": False, "sym": False, "checkpoint_format": "gptq_v2"}
    awq = {"version": "gemm", "zero_point": True}
    return {"quant_method": method, "bits": 4} | (own if method == "gptq" else awq) | more


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    k=st.sampled_from([32, 64, 96]),
    n=st.sampled_from([32, 64]),
    group=st.sampled_from([16, 32, -1]),
    version=st.sampled_from(["v1", "v2"]),
)
@settings(max_examples=25)
def test_a_gptq_layer_is_its_formula(bits: int, k: int, n: int, group: int, version: str) -> None:
    tensors, codes, weight = layer(k, n, bits, k if group == -1 else group)
    given = tensors if version == "v2" else as_v1(tensors, bits, n)
    stored = StoredFormat.of(settings_of(bits=bits, group_size=group), "here")
    found = read_layer(given, k, n, stored, version, "fc")
    assert torch.equal(unpack_codes(found.qweight, bits, k), codes.to(torch.uint8))
    assert torch.allclose(found.dequantize().double(), weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("group", [16, 32])
def test_an_awq_layer_is_its_formula(group: int) -> None:
    tensors, codes, weight = layer(64, 40, 4, group, method="awq")
    stored = StoredFormat.of(settings_of("awq", group_size=group), "here")
    found = read_layer(tensors, 64, 40, stored, stored.tag, "fc")
    assert torch.equal(unpack_codes(found.qweight, 4, 64), codes.to(torch.uint8))
    assert torch.allclose(found.dequantize().double(), weight, atol=1e-6, rtol=0)


def test_broken_layers_are_refused() -> None:
    tensors, _, _ = layer(64, 32, 4, 32)
    stored = StoredFormat.of(settings_of(group_size=32), "here")

    def refused(match: str, kind: type[Exception] = UserInputError, **odd: Tensor) -> None:
        with pytest.raises(kind, match=match) as caught:
            read_layer(tensors | odd, 64, 32, stored, "v2", "fc")
        assert caught.value.where == "fc"  # type: ignore[attr-defined]

    refused(r"qzeros is \[2, 32\], a layer of 64×32 in groups of 32 has \[2, 4\]",
            qzeros=torch.zeros(2, 32, dtype=torch.int32))  # fmt: skip
    refused(r"scales is \[4, 32\]", scales=torch.ones(4, 32))
    refused(r"qweight is torch.int32 \[4, 32\]", qweight=tensors["qweight"][:4])
    refused("NaN or infinite", scales=torch.full((2, 32), float("nan")))
    refused("act-order", UnsupportedError, g_idx=torch.arange(64) % 2)
    with pytest.raises(UserInputError, match="qzeros is missing"):
        read_layer({"qweight": tensors["qweight"]}, 64, 32, stored, "v2", "fc")


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"quant_method": "hqq"}, "quantized by 'hqq'"),
        ({"checkpoint_format": "marlin"}, "version 'marlin'"),
        ({"bits": 5}, "bits are 5"),
        ({"group_size": 0}, "groups of 0"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
    ],
)
def test_formats_that_are_not_known_are_refused(odd: dict[str, Any], message: str) -> None:
    with pytest.raises((UserInputError, UnsupportedError), match=message):
        StoredFormat.of(settings_of(group_size=32) | odd, "here")
