"""`load_stored`: a Hugging Face folder whose linear layers are quantized already (GPTQ, AWQ)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.capture.gptq import PARTS, V1, V2, StoredFormat, read_layer, tell_zeros
from qalora_compile.capture.skeleton import model_class
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.files import read_json
from qalora_compile.ir.storage import load_tensors
from qalora_compile.ir.stored import StoredWeight

SETTINGS = "quantization_config"
_OWN = (*PARTS, "g_idx")


def is_stored(folder: Path) -> bool:
    """Whether the folder's `config.json` says that its weights are quantized."""
    return bool(read_json(folder / "config.json").get(SETTINGS))


def load_stored(
    folder: Path, *, zero_points: str | None = None
) -> tuple[nn.Module, dict[str, StoredWeight], tuple[str, ...]]:
    """The model in float32, its quantized layers as they are stored, and what there is to say.

    The float weights of quantized layers are what their codes stand for: the model can be captured
    and run, and `quantize_groups(…, stored=…)` puts the codes themselves into the program.

    Args:
        folder: With `config.json` and safetensors.
        zero_points: `v1` or `v2`: how GPTQ's zero-points are stored, against the checkpoint's tag.

    Raises:
        UserInputError: a tensor is missing, of another shape, or of no layer of the model.
        UnsupportedError: a format, or a layer that is no linear one.
    """
    where = str(folder / "config.json")
    if zero_points not in (None, V1, V2):
        raise UserInputError(f"zero_points is {zero_points!r}", hint=f"use {V1} or {V2}")
    stored = StoredFormat.of(read_json(folder / "config.json")[SETTINGS], where)
    layers, others = _read_tensors(folder)
    zeros, note = tell_zeros(layers, stored)
    if zero_points is not None:
        zeros, note = zero_points, None
    model = _empty_model(folder)
    found = {}
    for path, parts in layers.items():
        layer = _linear_of(model, path)
        k, n = layer.in_features, layer.out_features
        found[path] = read_layer(parts, k, n, stored, zeros, path)
    _fill(model, found, others, folder)
    return model.eval(), found, (note,) if note else ()


def _read_tensors(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each quantized layer, and all others by name."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    others: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_tensors(file).items():
            path, _, part = name.rpartition(".")
            if part in _OWN:
                layers[path][part] = tensor
            else:
                others[name] = tensor
    if not layers:
        raise UserInputError("the checkpoint holds no quantized layer", where=str(folder))
    return dict(layers), others


def _empty_model(folder: Path) -> Any:
    kind = model_class(folder)
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    del config.quantization_config
    return kind._from_config(config, dtype=torch.float32)


def _linear_of(model: nn.Module, path: str) -> nn.Linear:
    try:
        layer: nn.Module | None = model.get_submodule(path)
    except AttributeError:
        layer = None
    if layer is None:
        raise UserInputError("the model has no such layer", where=path)
    if not isinstance(layer, nn.Linear):
        raise UnsupportedError(f"a quantized {type(layer).__name__} cannot be read", where=path)
    return layer


def _fill(
    model: nn.Module,
    layers: Mapping[str, StoredWeight],
    others: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Give the model its values; a parameter that is tied to another may be missing."""
    weights = {f"{path}.weight": layer.dequantize() for path, layer in layers.items()}
    named = dict(model.named_parameters(remove_duplicate=False))
    given = {**others, **weights}
    # GPTQ writes a bias, of zeros, for layers that have none
    empty = {n for n in given if n.endswith(".bias") and n not in named and not given[n].any()}
    try:
        result = model.load_state_dict(
            {n: t for n, t in given.items() if n not in empty}, strict=False
        )
    except RuntimeError as error:
        raise UserInputError(
            f"the checkpoint does not fit its config.json: {str(error).splitlines()[-1].strip()}",
            where=str(folder),
        ) from error
    filled = {id(named[name]) for name in given if name in named}
    missing = [n for n in result.missing_keys if n in named and id(named[n]) not in filled]
    if missing or result.unexpected_keys:
        raise UserInputError(
            f"the tensor {missing[0]} is missing"
            if missing
            else f"the tensor {result.unexpected_keys[0]} is of no part of the model",
            where=str(folder),
        )
