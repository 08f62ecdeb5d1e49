"""The verifier's decoder against the codes that were packed, for every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qalora_compile.errors import UserInputError
from qalora_compile.ir.packing.bitstream import pack_codes
from qalora_compile.ir.packing.kernel_layouts import pack_groups
from qalora_compile.verify.proof.graphs.stored_tensor import Array, from_onnx, read_safetensors
from qalora_compile.verify.proof.weights.unpack import (
    block_codes,
    flat_codes,
    flat_columns,
    group_codes,
    row_codes,
)

BITS = st.sampled_from([2, 3, 4, 8])


def codes(n: int, k: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    return torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)


@given(n=st.integers(1, 5), k=st.integers(1, 70), bits=BITS)
def test_rows(n: int, k: int, bits: int) -> None:
    made = codes(n, k, bits)
    assert np.array_equal(row_codes(pack_codes(made, bits).numpy(), bits, k), made.numpy())


@given(n=st.integers(1, 3), groups=st.integers(1, 40), size=st.integers(1, 6), bits=BITS)
def test_groups(n: int, groups: int, size: int, bits: int) -> None:
    width = 16 * size
    made = codes(n, groups * width, bits)
    packed = pack_groups(made, bits=bits, group_size=width).numpy()
    assert np.array_equal(group_codes(packed, bits, width), made.numpy())


@given(n=st.integers(1, 4), blocks=st.integers(1, 5), bits=st.sampled_from([2, 4, 8]))
def test_blocks(n: int, blocks: int, bits: int) -> None:
    made = codes(n, blocks * 16, bits)
    packed = pack_codes(made, bits).reshape(n, blocks, -1).numpy()
    assert np.array_equal(block_codes(packed, bits), made.numpy())


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 1)])
def test_small_integers_as_onnx_packs_them(shape: tuple[int, int]) -> None:
    made = codes(*shape, 4).numpy()
    proto = onnx.helper.make_tensor("w", onnx.TensorProto.UINT4, shape, made)
    raw = np.frombuffer(onnx.TensorProto.FromString(_raw(proto)).raw_data, np.uint8)
    assert np.array_equal(flat_codes(raw, 4, shape), made)
    for part in (slice(0, 2), slice(2, 4), slice(1, 3)):
        assert np.array_equal(flat_columns(raw, 4, shape, part), made[:, part])


def _raw(proto: onnx.TensorProto) -> bytes:
    """The tensor with its values as raw data, as files hold them."""
    values = onnx.numpy_helper.to_array(proto)
    made: bytes = onnx.numpy_helper.from_array(values, "w").SerializeToString()
    return made


def test_types_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -2.0, 3.0e-3]])
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    tensors = {str(kind): values.to(kind) for kind in kinds}
    tensors |= {"codes": torch.tensor([1, 255], dtype=torch.uint8), "none": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "t.safetensors")
    found = read_safetensors(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        expected: Array = tensor.double().numpy()
        assert np.array_equal(found[name].wide(), expected)
        assert found[name].shape == tuple(tensor.shape)


def test_external_data_is_read_where_it_lies(tmp_path: Path) -> None:
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float32)
    graph = onnx.helper.make_graph(
        [],
        "g",
        [],
        [],
        [onnx.numpy_helper.from_array(v, n) for v, n in ((first, "a"), (second, "b"))],
    )
    onnx.save(
        onnx.helper.make_model(graph),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        size_threshold=0,
    )
    loaded = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    found = [from_onnx(proto, tmp_path).values() for proto in loaded.graph.initializer]
    assert np.array_equal(found[0], first)
    assert np.array_equal(found[1], second)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(UserInputError, match="missing"):
        read_safetensors(path)
    path.write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(UserInputError, match="not valid JSON"):
        read_safetensors(path)
    save_file({"a": torch.ones(64)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserInputError, match="of 256 bytes"):
        read_safetensors(path)
