"""Malformed files of every reader: an error of our own that says where, whatever is in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qalora_compile.capture.checkpoints.awq import decode_awq
from qalora_compile.capture.checkpoints.base import Decoded, Tensors
from qalora_compile.capture.checkpoints.compressed_tensors import decode_compressed
from qalora_compile.capture.checkpoints.gptq import decode_gptq
from qalora_compile.capture.checkpoints.hqq import decode_hqq
from qalora_compile.capture.checkpoints.mlx import decode_mlx
from qalora_compile.capture.checkpoints.qalora import METHOD, decode_own
from qalora_compile.capture.load_source import load_source
from qalora_compile.errors import QaloraError, UserInputError
from tests.capture.checkpoints.models import write_folder
from tests.capture.checkpoints.test_folders import config_of, hqq_layer, mlx_layer
from tests.capture.checkpoints.test_gptq import AWQ, awq_layer, gptq_config, gptq_layer

N, K, GROUP = 32, 64, 32
MODULE = "some.layer"
Options = dict[str, Any]


def _layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=False)


def _compressed() -> tuple[dict[str, Tensor], Options]:
    words = torch.randint(0, 2**31 - 1, (N, K * 4 // 32), dtype=torch.int32)
    tensors = {
        "weight_packed": words,
        "weight_scale": torch.rand(N, K // GROUP),
        "weight_shape": torch.tensor([N, K]),
        "weight_zero_point": torch.zeros(N * 4 // 32, K // GROUP, dtype=torch.int32),
    }
    weights = {"strategy": "group", "type": "int", "num_bits": 4, "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    said = {"format": "pack-quantized", "config_groups": groups}
    return tensors, {"quantization_config": said}


def _own() -> tuple[dict[str, Tensor], Options]:
    """The configuration is `layers.json`: `_read_own` writes it."""
    layer = {"bits": 4, "k": K, "group_size": GROUP, "ordered": True}
    tensors = {
        "qweight": torch.zeros(N, K // 2, dtype=torch.uint8),
        "scale": torch.rand(N, K // GROUP),
        "offset": torch.rand(N, K // GROUP),
        "order": torch.randperm(K).to(torch.int32),
    }
    return tensors, {"format": METHOD, "version": 2, "layers": {MODULE: layer}}


def _read_own(tensors: Tensors, config: Mapping[str, Any], *, folder: Path) -> object:
    (folder / "layers.json").write_text(json.dumps(config))
    return decode_own(tensors, {}, folder=folder)


READERS = ("gptq", "awq", "hqq", "mlx", "compressed-tensors", "own")


def made(reader: str, folder: Path) -> tuple[Any, dict[str, Tensor], Options]:
    """A reader, the tensors of one layer, and what is said of them."""
    if reader == "own":
        return partial(_read_own, folder=folder), *_own()
    if reader == "compressed-tensors":
        return decode_compressed, *_compressed()
    layers: dict[str, tuple[Callable[..., Decoded], Callable[[], Any], Options]] = {
        "gptq": (decode_gptq, lambda: gptq_layer([]), gptq_config(dynamic={"x": {"bits": 2}})),
        "awq": (decode_awq, lambda: awq_layer([]), AWQ),
        "hqq": (decode_hqq, lambda: hqq_layer(4, []), config_of("hqq", 4)),
        "mlx": (decode_mlx, lambda: mlx_layer(4, []), config_of("mlx", 4)),
    }
    decode, layer, config = layers[reader]
    return decode, layer()(_layer()), json.loads(json.dumps(config))


BAD_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "of no axis": lambda t: t.flatten()[0].clone(),
    "of one axis": lambda t: t.flatten(),
    "of three axes": lambda t: t[None],
    "empty": lambda t: t[:0] if t.dim() else t.new_empty(0),
    "cut": lambda t: t[..., :-1].contiguous() if t.dim() else t.new_empty(0),
    "twice": lambda t: torch.cat([t.reshape(1, *t.shape)] * 2).flatten(0, min(1, t.dim())),
    "int64": lambda t: t.long(),
    "floats": lambda t: t.double(),
    "uint8": lambda t: t.to(torch.uint8),
    "negative": lambda t: -torch.ones_like(t, dtype=torch.int32),
}
BAD_VALUES: tuple[object, ...] = (None, 0, -7, "x", [], [1], 1.5, True, {"a": "b"}, 10**12, "re:(")


def _places(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths to all values of a configuration, and to all groups of them."""
    for name, value in config.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from _places(value, (*path, name))


def _read(decode: Any, tensors: Mapping[str, Tensor], config: Options) -> bool:
    """Whether it was refused, with where."""
    try:
        decode({f"{MODULE}.{name}": t for name, t in tensors.items()}, config)
    except QaloraError as error:
        if not error.where:
            pytest.fail(f"{error} says not where")
        return True
    return False


@pytest.mark.parametrize("reader", READERS)
def test_tensors_of_any_shape_and_dtype_are_read_or_refused(reader: str, tmp_path: Path) -> None:
    decode, tensors, config = made(reader, tmp_path)
    assert not _read(decode, tensors, config)
    refused = dict.fromkeys(tensors, 0)
    for name, tensor in tensors.items():
        for change in BAD_TENSORS.values():
            refused[name] += _read(decode, tensors | {name: change(tensor)}, config)
    matrices = [name for name, t in tensors.items() if t.dim() == 2]
    assert len(matrices) >= 3
    assert min(refused[name] for name in matrices) >= 7, refused


@pytest.mark.parametrize("reader", [name for name in READERS if name != "hqq"])
def test_options_of_any_value_are_read_or_refused(reader: str, tmp_path: Path) -> None:
    decode, tensors, config = made(reader, tmp_path)
    refused: dict[str, int] = {}
    for path in _places(config):
        for value in BAD_VALUES:
            changed = json.loads(json.dumps(config))
            inner = changed
            for name in path[:-1]:
                inner = inner[name]
            inner[path[-1]] = value
            refused[path[-1]] = refused.get(path[-1], 0) + _read(decode, tensors, changed)
    said = [name for name in refused if "bits" in name or name in ("group_size", "k")]
    assert said
    assert min(refused[name] for name in said) >= 9, refused


ORDERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "cut": (lambda t: t[:-1], rf"order is torch.int32 \[{K - 1}\], but {K} columns need"),
    "too long": (lambda t: torch.cat([t, t.new_tensor([K])]), "columns need int32"),
    "two axes": (lambda t: t[None], "columns need int32"),
    "int64": (lambda t: t.long(), rf"order is torch.int64 \[{K}\]"),
    "floats": (lambda t: t.float(), "order is torch.float32"),
    "a column twice": (lambda t: t.clamp(min=1), "does not name each column from 0 to"),
    "a column beyond": (lambda t: t + 1, "does not name each column"),
    "a negative column": (lambda t: t - 1, "does not name each column"),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_an_order_is_one_int32_for_each_column(kind: str, tmp_path: Path) -> None:
    change, words = ORDERS[kind]
    decode, tensors, config = made("own", tmp_path)
    tensors["order"] = change(tensors["order"])
    with pytest.raises(UserInputError, match=words) as caught:
        decode({f"{MODULE}.{name}": t for name, t in tensors.items()}, config)
    assert caught.value.where == f"{MODULE}.order"


@pytest.mark.parametrize(
    ("version", "ordered", "words"),
    [
        (1, True, "has an order of columns, but the folder has version 1"),
        (2, "yes", "ordered is 'yes'"),
        (2, 1, "ordered is 1"),
        (3, True, "version 3"),
    ],
)
def test_what_is_said_of_an_order(
    version: int, ordered: object, words: str, tmp_path: Path
) -> None:
    decode, tensors, config = made("own", tmp_path)
    config["version"], config["layers"][MODULE]["ordered"] = version, ordered
    with pytest.raises(UserInputError, match=words) as caught:
        decode({f"{MODULE}.{name}": t for name, t in tensors.items()}, config)
    assert "layers.json" in str(caught.value.where)


def test_an_order_that_was_lost_or_not_said_is_noticed(tmp_path: Path) -> None:
    decode, tensors, config = made("own", tmp_path)
    named = {f"{MODULE}.{name}": t for name, t in tensors.items()}
    order = named.pop(f"{MODULE}.order")
    with pytest.raises(UserInputError, match=f"no tensor {MODULE}.order"):
        decode(named, config)
    del config["layers"][MODULE]["ordered"]
    named[f"{MODULE}.order"] = order
    assert f"{MODULE}.order" not in decode(named, config).used, "the model has to know it"


CONFIGS: dict[str, tuple[Options, str]] = {
    "gptq without bits": ({"quantization_config": {"quant_method": "gptq"}}, "bits is missing"),
    "gptq in groups of 0": (gptq_config(group_size=0), "group_size is 0"),
    "gptq of 0 bits": (gptq_config(bits=0), "bits is 0"),
    "gptq with rules in a list": (gptq_config(dynamic=["a"]), r"dynamic is \['a'\]"),
    "awq in groups of null": (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": None}},
        "group_size is missing",
    ),
    "mlx without bits": ({"quantization": {"group_size": 32}}, "bits is missing"),
    "mlx of 0 bits": ({"quantization": {"group_size": 32, "bits": 0}}, "bits is 0"),
    "a method that is a list": ({"quantization_config": ["gptq"]}, "quantization_config is"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_folder_is_named_too(kind: str, tmp_path: Path) -> None:
    config, words = CONFIGS[kind]
    layer = mlx_layer(4, []) if "mlx" in kind else gptq_layer([])
    write_folder(tmp_path / "model", layer, config)
    with pytest.raises(UserInputError, match=words) as caught:
        load_source(str(tmp_path / "model"))
    assert str(tmp_path / "model") in str(caught.value.where)


def test_a_config_that_is_a_list_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", gptq_layer([]), gptq_config())
    (tmp_path / "model" / "config.json").write_text("[]")
    with pytest.raises(UserInputError, match="no JSON object"):
        load_source(str(tmp_path / "model"))
