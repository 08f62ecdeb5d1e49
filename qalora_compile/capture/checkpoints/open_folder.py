"""Hugging Face folders whose weights are quantized already, as float models with their codes."""

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
"""The entries of `config.json` that say how weights are quantized."""
_GPTQ_CONFIG = "quantize_config.json"
"""AutoGPTQ's own file, of what newer tools put under `quantization_config`."""


@dataclass(frozen=True)
class StoredModel:
    """A model in float32, in evaluation mode, with the codes that its weights were made of."""

    model: nn.Module
    weights: tuple[CheckpointWeight, ...]
    notes: tuple[str, ...]

    def codes(self) -> CheckpointCodes:
        """The codes, to be found by rows; made on each call, since only quantizing asks for it."""
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
        folder: `config.json` with `quantization` (MLX) or `quantization_config`, or beside it
            AutoGPTQ's `quantize_config.json`; and safetensors.
        zero_points: How a GPTQ checkpoint stores its zero-points (`gptq_zeros.ZERO_POINTS`), where
            its tag is wrong or says nothing; None: by tag, numbers and weights.

    Raises:
        UserInputError: a tensor is missing, broken, or fits neither the others nor the model.
        UnsupportedError: the method is none of those that can be read.
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
    """`config.json`, with what AutoGPTQ says of the codes in a file of its own.

    Raises:
        UserInputError: a file, or what it says of the codes, is no object of JSON.
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
    """The reader of what `config.json` names.

    Raises:
        UnsupportedError: there is none.
        UserInputError: `zero_points` is said of another method than GPTQ.
    """
    method = str((config.get(HF) or {}).get("quant_method", ""))
    if zero_points is not None and method != GPTQ:
        raise UserInputError(
            f"zero_points is {zero_points!r}, of a checkpoint that is not GPTQ's",
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
    """See that what is not quantized holds numbers; of scales and zero-points a reader sees it.

    Raises:
        UserInputError: a tensor holds a NaN or an infinity; it is named.
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
    """The model with its weights in float32, and notes on what it leaves out or is doubtful.

    Raises:
        UserInputError: the model wants a tensor that is not there, or does not know one.
    """
    kind = model_class(folder)
    plain = {k: v for k, v in config.items() if k not in (*SECTIONS, "dtype", "torch_dtype")}
    state = {n: t.float() if t.is_floating_point() else t for n, t in rest.items()}
    turned = decoded.turned | _transposed(folder, decoded.weights)
    aside = []
    for module, stored in decoded.weights.items():
        weight = stored.dequantize()
        aside += [module] if _lies_aside(weight) else []
        state[f"{module}.weight"] = weight.t().contiguous() if module in turned else weight
    try:
        model, info = kind.from_pretrained(
            None,
            config=kind.config_class.from_dict(plain),
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises types of many kinds
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
                hint="config.json may be of another model",
            )
    notes = []
    if padding:
        notes.append(
            f"{len(padding)} biases that the model has not are left out: they are all zeros"
        )
    if aside:
        notes.append(
            f"the weights of {aside[0]} ({len(aside)} layers) lie further from 0 than they spread: "
            "their zero-points may be stored in another way than was read"
        )
    return model.eval(), tuple(notes)


def _lies_aside(weight: Tensor) -> bool:
    """Whether a weight lies to one side of 0, as none does that was trained."""
    return weight.numel() > 1 and bool(weight.mean().abs() > weight.std(correction=0))


def _transposed(folder: Path, modules: Iterable[str]) -> set[str]:
    """Those of the modules whose parameter the model has as `[K, N]`: transformers' Conv1D."""
    known, kind = modules_of(folder), transformers_module().pytorch_utils.Conv1D
    return {name for name in modules if isinstance(known.get(name), kind)}


def modules_of(folder: Path) -> dict[str, nn.Module]:
    """The modules that `config.json` describes, without weights, by every name of theirs.

    The names of a checkpoint may begin with that of the inner model, or leave it out.
    """
    model: Any = build_skeleton(folder)
    inside, found = f"{model.base_model_prefix}.", dict(model.named_modules())
    others = {
        name: module
        for path, module in found.items()
        for name in (path.removeprefix(inside), inside + path)
    }
    return others | found
