"""Quantized checkpoints, dequantized by the library that defines their format, if installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qalora_compile.errors import UserInputError
from qalora_compile.ir.safetensors_io import load_tensors
from qalora_compile.untrusted import quoted, read_json
from qalora_compile.untrusted.patterns import is_harmless

_COMPRESSED = "compressed_tensors"
_MODULES = {
    "mlx": "mlx.core",
    "hqq": "hqq.core.quantize",
    "compressed-tensors": f"{_COMPRESSED}.compressors.pack_quantized.base",
}
"""Format → the dequantizing module of its library."""
_NO_LIBRARY = {"gptq": "GPTQModel", "awq": "AutoAWQ"}
Weights = dict[str, Tensor]


def put_library_weights_(model: nn.Module, folder: Path) -> str:
    """Replace a model's weights by those that the format's own library dequantizes.

    Args:
        model: The model as read by this package, in float32.
        folder: The checkpoint.

    Returns:
        A text that names the reader of the codes: the library, or this package and why.

    Raises:
        UserInputError: the library cannot read the folder.
    """
    kind = _kind(folder)
    if kind not in _MODULES:
        other = f"; {_NO_LIBRARY[kind]} is not asked" if kind in _NO_LIBRARY else ""
        return f"qalora-compile{other}" if kind else "transformers"
    try:
        library = importlib.import_module(_MODULES[kind])
    except ImportError:
        return f"qalora-compile; {_MODULES[kind].partition('.')[0]} cannot be imported"
    try:
        weights = _READERS[kind](library, folder, model)
    except Exception as error:  # libraries raise exceptions of many types
        raise UserInputError(
            f"{kind} cannot read the checkpoint: {type(error).__name__}: {error}", where=str(folder)
        ) from error
    with torch.no_grad():
        for name, values in weights.items():
            model.get_parameter(f"{name}.weight").copy_(values)
    return f"{kind}, {len(weights)} weights"


def _kind(folder: Path) -> str:
    """The format of a folder's codes; empty if it has none."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    if "quantization" in config:
        return "mlx"
    return str((config.get("quantization_config") or {}).get("quant_method", ""))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _modules(tensors: Mapping[str, Any], part: str) -> list[str]:
    """The names of the modules that have a part."""
    return [name.removesuffix(part) for name in tensors if name.endswith(part)]


def _states(folder: Path, part: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module that has a part, by their names in it."""
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        tensors |= load_tensors(path)
    return {
        module: {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{module}.")
        }
        for module in _modules(tensors, part)
    }


def _by_mlx(library: Any, folder: Path, _: nn.Module) -> Weights:
    options = read_json(folder / "config.json")["quantization"]
    arrays: dict[str, Any] = {}
    for path in _files(folder):
        arrays |= library.load(str(path))
    found = {}
    for module in _modules(arrays, ".scales"):
        own = options.get(module)
        mine = own if isinstance(own, dict) else options
        parts = [arrays[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        sizes = {name: mine.get(name, options[name]) for name in ("group_size", "bits")}
        weight = library.dequantize(*parts, **sizes).astype(library.float32)
        found[module] = torch.from_numpy(np.array(weight))
    return found


def _by_hqq(library: Any, folder: Path, _: nn.Module) -> Weights:
    found = {}
    for module, state in _states(folder, ".W_q").items():
        layer = library.HQQLinear(
            None, None, device="cpu", compute_dtype=torch.float32, initialize=False
        )
        layer.load_state_dict(state)
        found[module] = layer.dequantize().float()
    return found


def _by_compressed_tensors(library: Any, folder: Path, model: nn.Module) -> Weights:
    """The weights as dequantized by compressed-tensors, which matches layers to groups itself.

    Raises:
        LookupError: a layer with codes is in no group of the configuration, or is ignored by it.
    """
    schemes = importlib.import_module(f"{_COMPRESSED}.quantization")
    match = importlib.import_module(f"{_COMPRESSED}.utils.match")
    config = read_json(folder / "config.json")["quantization_config"]
    groups = {
        target: group for group in config["config_groups"].values() for target in group["targets"]
    }
    odd = next((t for t in [*groups, *(config.get("ignore") or [])] if not is_harmless(t)), None)
    if odd is not None:  # the library uses a backtracking engine, which some expressions keep busy
        raise LookupError(f"the target {quoted(odd)} may take the library too long to match")
    found = {}
    for module, state in _states(folder, ".weight_packed").items():
        layer = model.get_submodule(module)
        targets = match.match_targets(module, layer, groups)  # the most specific is the first
        if not targets or match.is_match(module, layer, config.get("ignore") or []):
            raise LookupError(f"{module} has codes, but config.json says that it is in float")
        scheme = schemes.QuantizationScheme(**groups[targets[0]])
        made = library.PackedQuantizationCompressor.decompress(state, scheme)
        found[module] = made["weight"].float()
    return found


_READERS: dict[str, Callable[[Any, Path, nn.Module], Weights]] = {
    "mlx": _by_mlx,
    "hqq": _by_hqq,
    "compressed-tensors": _by_compressed_tensors,
}
