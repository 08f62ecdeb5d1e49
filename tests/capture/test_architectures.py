"""The deferred reader gives exactly what transformers loads, architecture by architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qalora_compile.capture import lazy_folder
from qalora_compile.capture.lazy_folder import load_checkpoint
from qalora_compile.errors import UnsupportedError
from qalora_compile.ir import lazy_tensor
from qalora_compile.ir.lazy_tensor import is_lazy, materialize
from qalora_compile.ir.safetensors_io import read_rows, read_tensor
from tests.models import slow
from tests.zoo.architectures import ARCHITECTURES, LOADED_OTHERWISE, build


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers, stored ones and others, a tied one by each of its names."""
    return {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}


def ties_of(model: Any) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(tied) for tied in names.values()}


@pytest.mark.parametrize(
    "name", [*ARCHITECTURES[::4], *slow(*(n for i, n in enumerate(ARCHITECTURES) if i % 4))]
)
def test_tensors_are_those_of_from_pretrained(name: str, tmp_path: Path) -> None:
    import transformers

    build(name).save_pretrained(tmp_path)
    if name in LOADED_OTHERWISE:
        with pytest.raises(UnsupportedError, match=LOADED_OTHERWISE[name]):
            load_checkpoint(tmp_path)
        return
    theirs = getattr(transformers, name).from_pretrained(tmp_path, dtype="auto")
    ours = load_checkpoint(tmp_path).model
    expected, found = tensors_of(theirs), tensors_of(ours)
    assert found.keys() == expected.keys()
    assert ties_of(ours) == ties_of(theirs)
    assert sum(map(is_lazy, found.values())) > len(found) / 2
    for key, tensor in found.items():
        values = materialize(tensor)
        assert values.dtype == expected[key].dtype, key
        assert torch.equal(values, expected[key]), key


def test_experts_are_read_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No expert is read to load a model, and of a stack of them as many as are asked for."""
    read: list[str] = []

    def watched(function: Any) -> Any:
        def run(path: Path, name: str, *args: int) -> Tensor:
            read.append(name)
            result: Tensor = function(path, name, *args)
            return result

        return run

    monkeypatch.setattr(lazy_folder, "read_tensor", watched(read_tensor))
    monkeypatch.setattr(lazy_folder, "read_rows", watched(read_rows))
    monkeypatch.setattr(lazy_tensor, "_PART_ELEMENTS", 1)
    build("MixtralForCausalLM").save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path).model
    assert not [each for each in read if "expert" in each]
    stacked = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    for number, part in enumerate(lazy_tensor.materialize_parts(stacked)):
        assert part.shape == (1, 192, 64)
        assert len(read) == 2 * (number + 1)  # its gate and its up projection
    assert len(read) == 8
