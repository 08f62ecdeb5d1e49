"""Opens Hugging Face folders with quantized weights as float models with their codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.capture.checkpoints.base import (
    CONFIG,
    Decoded,
    OpenFolder,
    Reader,
    section,
)
from qalora_compile.capture.checkpoints.mlx import KEY as MLX_KEY
from qalora_compile.capture.checkpoints.registry import GPTQ, MLX, READERS, get_reader
from qalora_compile.capture.skeleton import build_skeleton, model_class, transformers_module
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.checkpoint_codes import CheckpointCodes, CheckpointWeight
from qalora_compile.ir.safetensors_io import load_tensors
from qalora_compile.untrusted import read_object

HF = "quantization_config"
SECTIONS = (MLX_KEY, HF)
"""The entries of `config.json` that describe the quantization of weights."""
_GPTQ_CONFIG = "quantize_config.json"
"""AutoGPTQ's own file for what newer tools put under `quantization_config`."""


@dataclass(frozen=True)
class StoredModel:
    """A model in float32, in evaluation mode, with the codes of its weights."""

    model: nn.Module
    weights: tuple[CheckpointWeight, ...]
    notes: tuple[str, ...]

    def codes(self) -> CheckpointCodes:
        """The codes, indexed by rows; computed on each call, since only quantization needs them."""
        codes = CheckpointCodes()
        for weight in self.weights:
            codes.add(weight)
        return codes


def is_quantized(folder: Path) -> bool:
    """Whether `config.json`, or `quantize_config.json`, says that the weights are quantized.

    Raises:
        UserInputError: one of them is malformed.
    """
    return _says_codes(_config_of(folder))


def load_stored(folder: Path, *, zero_points: str | None = None) -> StoredModel:
    """Read a quantized checkpoint.

    Args:
        folder: Contains safetensors and `config.json` with `quantization` (MLX) or
            `quantization_config`, or AutoGPTQ's `quantize_config.json` next to it.
        zero_points: How a GPTQ checkpoint stores its zero-points (`STORED_ZERO_POINTS`), if its
            tag is wrong or inconclusive; None decides by tag, numbers and weights.

    Raises:
        UserInputError: a tensor is missing or broken, or does not fit the others or the model.
        UnsupportedError: the quantization method is not supported.
    """
    config = _config_of(folder)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_tensors(path)
    try:
        read = _reader(folder, config, zero_points)
        decoded = read(
            tensors, config, OpenFolder(folder, partial(modules_of, folder), zero_points)
        )
    except (UserInputError, UnsupportedError) as error:
        error.where = f"{folder}: {error.where}" if error.where else str(folder)
        raise
    rest = {name: t for name, t in tensors.items() if name not in decoded.used}
    _check_finite(rest, folder)
    model, notes = _build(folder, config, decoded, rest)
    notes = (*decoded.notes, *notes, *_widening(rest))
    return StoredModel(model, tuple(decoded.weights.values()), notes)


def _config_of(folder: Path) -> Mapping[str, Any]:
    """`config.json`, merged with AutoGPTQ's own file.

    Raises:
        UserInputError: a file, or its section on quantization, is not a JSON object.
    """
    config, own = read_object(folder / CONFIG), folder / _GPTQ_CONFIG
    if not _says_codes(config) and own.is_file():
        return {**config, HF: {"quant_method": GPTQ, **read_object(own)}}
    for key in SECTIONS:
        section(config, key, str(folder / CONFIG))
    return config


def _says_codes(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) is not None for key in SECTIONS)


def _reader(folder: Path, config: Mapping[str, Any], zero_points: str | None) -> Reader:
    """The reader for the method that `config.json` names.

    Raises:
        UnsupportedError: there is no such reader.
        UserInputError: `zero_points` is given for a method other than GPTQ.
    """
    method = str((config.get(HF) or {}).get("quant_method", ""))
    if zero_points is not None and method != GPTQ:
        raise UserInputError(
            f"zero_points is {zero_points!r}, but the checkpoint is not GPTQ's",
            hint="leave it out",
        )
    if method not in READERS:
        if config.get(MLX_KEY) is not None:
            return get_reader(MLX)
        raise UnsupportedError(
            f"checkpoints quantized by {method or 'an unnamed method'} cannot be read",
            hint=f"these can: {', '.join((*READERS.names(), 'GGUF'))}; or give the float model",
        )
    return get_reader(method)


def _check_finite(rest: Mapping[str, Tensor], folder: Path) -> None:
    """Check that unquantized tensors are finite; readers check scales and zero-points.

    Raises:
        UserInputError: a tensor holds a NaN or an infinity; the error names it.
    """
    for name, tensor in rest.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserInputError(
                f"{name} holds a NaN or an infinity",
                where=str(folder),
                hint="the checkpoint is damaged: fetch it again",
            )


def _widening(rest: Mapping[str, Tensor]) -> tuple[str, ...]:
    narrow = Counter(
        str(t.dtype).removeprefix("torch.")
        for t in rest.values()
        if t.is_floating_point() and t.dtype != torch.float32
    )
    return tuple(
        f"{count} tensors that are not quantized are {dtype} and computed in float32"
        for dtype, count in narrow.items()
    )


def _build(
    folder: Path, config: Mapping[str, Any], decoded: Decoded, rest: Mapping[str, Tensor]
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with its weights in float32, and notes on ignored and doubtful tensors.

    Raises:
        UserInputError: a tensor of the model is missing, or the model does not know one.
    """
    kind = model_class(folder)
    plain = {k: v for k, v in config.items() if k not in (*SECTIONS, "dtype", "torch_dtype")}
    state = {n: t.float() if t.is_floating_point() else t for n, t in rest.items()}
    transposed = decoded.transposed | _transposed(folder, decoded.weights)
    off_center = []
    for module, stored in decoded.weights.items():
        weight = stored.dequantize()
        off_center += [module] if _is_off_center(weight) else []
        state[f"{module}.weight"] = weight.t().contiguous() if module in transposed else weight
    try:
        model, info = kind.from_pretrained(
            None,
            config=kind.config_class.from_dict(plain),
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises exceptions of many types
        raise UserInputError(
            f"the tensors do not make a {kind.__name__}: {type(error).__name__}: {error}",
            where=str(folder),
        ) from error
    padding = {
        bias
        for module in decoded.weights
        if (bias := f"{module}.bias") in info["unexpected_keys"] and not state[bias].any()
    }
    for key, what in (("missing_keys", "has no"), ("unexpected_keys", "has an unknown")):
        odd = sorted(set(map(str, info[key])) - padding)
        if odd:
            raise UserInputError(
                f"the checkpoint {what} tensor {odd[0]} ({len(odd)} in all)",
                where=str(folder),
                hint="config.json may belong to another model",
            )
    notes = []
    if padding:
        notes.append(
            f"{len(padding)} biases that the model does not have are ignored: they are all zeros"
        )
    if off_center:
        notes.append(
            f"the weights of {off_center[0]} ({len(off_center)} layers) have a mean farther from "
            "0 than their standard deviation: their zero-points may be stored in another form"
        )
    return model.eval(), tuple(notes)


def _is_off_center(weight: Tensor) -> bool:
    """Whether the mean is farther from 0 than the standard deviation, unlike in trained weights."""
    return weight.numel() > 1 and bool(weight.mean().abs() > weight.std(correction=0))


def _transposed(folder: Path, modules: Iterable[str]) -> set[str]:
    """The modules whose parameter in the model is `[K, N]`: transformers' Conv1D."""
    known, kind = modules_of(folder), transformers_module().pytorch_utils.Conv1D
    return {name for name in modules if isinstance(known.get(name), kind)}


def modules_of(folder: Path) -> dict[str, nn.Module]:
    """The modules that `config.json` describes, without weights, by each of their names.

    The names of a checkpoint may begin with that of the inner model or omit it.
    """
    model: Any = build_skeleton(folder)
    inside, found = f"{model.base_model_prefix}.", dict(model.named_modules())
    others = {
        name: module
        for path, module in found.items()
        for name in (path.removeprefix(inside), inside + path)
    }
    return others | found
