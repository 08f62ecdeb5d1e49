"""Hugging Face folders whose weights are quantized already, as float models with their codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.capture.skeleton import model_class
from qalora_compile.capture.stored.awq import decode_awq
from qalora_compile.capture.stored.base import Decoded, Reader
from qalora_compile.capture.stored.compressed import decode_compressed
from qalora_compile.capture.stored.gptq import decode_gptq
from qalora_compile.capture.stored.hqq import decode_hqq
from qalora_compile.capture.stored.mlx import KEY as MLX
from qalora_compile.capture.stored.mlx import decode_mlx
from qalora_compile.capture.stored.own import METHOD as OWN
from qalora_compile.capture.stored.own import decode_own
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.files import read_json
from qalora_compile.ir.storage import load_tensors
from qalora_compile.ir.stored_codes import StoredCodes, StoredWeight

HF = "quantization_config"
_METHODS: dict[str, Reader] = {
    "awq": decode_awq,
    "compressed-tensors": decode_compressed,
    "gptq": decode_gptq,
    "hqq": decode_hqq,
}


@dataclass(frozen=True)
class StoredModel:
    """A model in float32, in evaluation mode, with the codes that its weights were made of."""

    model: nn.Module
    weights: tuple[StoredWeight, ...]
    notes: tuple[str, ...]

    def codes(self) -> StoredCodes:
        """The codes, to be found by rows; made on each call, since only quantizing asks for it."""
        codes = StoredCodes()
        for weight in self.weights:
            codes.add(weight)
        return codes


def is_quantized(folder: Path) -> bool:
    """Whether `config.json` says that the weights are quantized."""
    config = read_json(folder / "config.json")
    return MLX in config or HF in config


def load_stored(folder: Path, *, zero_points: str | None = None) -> StoredModel:
    """Read a quantized checkpoint.

    Args:
        folder: `config.json` with `quantization` (MLX) or `quantization_config`, and safetensors.
        zero_points: How a GPTQ checkpoint stores its zero-points (`gptq.ZERO_POINTS`), where its
            tag is wrong or says nothing; None: by tag and numbers.

    Raises:
        UserInputError: a tensor is missing, broken, or fits neither the others nor the model.
        UnsupportedError: the method is none of those that can be read.
    """
    config = read_json(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_tensors(path)
    try:
        decoded = _reader(folder, config, zero_points)(tensors, config)
    except (UserInputError, UnsupportedError) as error:
        error.where = f"{folder}: {error.where}" if error.where else str(folder)
        raise
    rest = {name: t for name, t in tensors.items() if name not in decoded.used}
    model = _build(folder, config, decoded, rest)
    return StoredModel(model, tuple(decoded.weights.values()), decoded.notes + _widening(rest))


def _reader(folder: Path, config: Mapping[str, Any], zero_points: str | None) -> Reader:
    """The reader of what `config.json` names.

    Raises:
        UnsupportedError: there is none.
        UserInputError: `zero_points` is said of another method than GPTQ.
    """
    method = str((config.get(HF) or {}).get("quant_method", ""))
    if method == "gptq":
        return partial(decode_gptq, zero_points=zero_points)
    if zero_points is not None:
        raise UserInputError(
            f"zero_points is {zero_points!r}, of a checkpoint that is not GPTQ's",
            hint="leave it out",
        )
    if method == OWN:
        return partial(decode_own, folder=folder)
    if method in _METHODS:
        return _METHODS[method]
    if MLX in config:
        return decode_mlx
    raise UnsupportedError(
        f"checkpoints quantized by {method or 'an unnamed method'} cannot be read",
        hint=f"these can: {', '.join((*_METHODS, 'MLX affine', 'GGUF'))}; or give the float model",
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
) -> nn.Module:
    """The model with its weights in float32.

    Raises:
        UserInputError: the model wants a tensor that is not there, or does not know one.
    """
    kind = model_class(folder)
    plain = {k: v for k, v in config.items() if k not in (MLX, HF, "dtype", "torch_dtype")}
    state = {n: t.float() if t.is_floating_point() else t for n, t in rest.items()}
    for module, stored in decoded.weights.items():
        weight = stored.dequantize()
        turned = module in decoded.turned
        state[f"{module}.weight"] = weight.t().contiguous() if turned else weight
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
    for key, what in (("missing_keys", "has no"), ("unexpected_keys", "has an unknown")):
        odd = sorted(map(str, info[key]))
        if odd:
            raise UserInputError(
                f"the checkpoint {what} tensor {odd[0]} ({len(odd)} in all)",
                where=str(folder),
                hint="config.json may be of another model",
            )
    evaluated: nn.Module = model.eval()
    return evaluated
