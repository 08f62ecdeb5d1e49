"""Transformers models without weights, for capture, which needs only shapes."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qalora_compile.capture.loading import keep_in_float32_
from qalora_compile.capture.sizes import check_config
from qalora_compile.capture.transformers_internals import new_model
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.torch_internals import FakeTensorMode
from qalora_compile.optional import require
from qalora_compile.untrusted import quoted, read_json, read_object


def transformers_module() -> Any:
    """The transformers package, offline and quiet."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = require("transformers", extra="hf", purpose="load Hugging Face and GGUF models")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def model_class(folder: Path) -> Any:
    """The class that the folder's `config.json` names.

    Raises:
        UnsupportedError: transformers has no such class; code in the folder is never run.
        UserInputError: `config.json` is missing or is not JSON.
    """
    config = read_object(folder / "config.json")
    check_config(config, folder)
    names = config.get("architectures") or []
    transformers = transformers_module()
    known = isinstance(names, list) and names and isinstance(names[0], str)
    if not known or not hasattr(transformers, names[0]):
        raise UnsupportedError(
            f"config.json names no architecture that transformers has ({quoted(names or 'none')})",
            where=str(folder / "config.json"),
            hint="use package.module:factory for a model of your own",
        )
    return getattr(transformers, names[0])


def generates(folder: Path) -> bool:
    """Whether the model of `config.json` generates tokens and can therefore have a cache.

    Raises:
        UnsupportedError, UserInputError: see `model_class`.
    """
    return bool(model_class(folder).can_generate())


def has_encoder(folder: Path) -> bool:
    """Whether the model that `config.json` describes has an encoder and a decoder."""
    known = read_json(folder / "config.json")
    default = getattr(model_class(folder).config_class(), "is_encoder_decoder", False)
    return bool(known.get("is_encoder_decoder", default))


def read_config(kind: Any, folder: Path) -> Any:
    """The configuration in a folder, for the class that `model_class` has found.

    Raises:
        UserInputError: transformers refuses it.
    """
    try:
        return kind.config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises exceptions of many types
        raise _undescribed(folder, kind, error) from error


def _undescribed(folder: Path, kind: Any, error: Exception) -> UserInputError:
    return UserInputError(
        f"config.json does not describe a {kind.__name__}: {type(error).__name__}: {error}",
        where=str(folder / "config.json"),
    )


def build_skeleton(folder: Path) -> nn.Module:
    """The model that `config.json` describes, in evaluation mode, its parameters fake tensors.

    Buffers, which no checkpoint holds in full, have their values.

    Args:
        folder: With `config.json`.

    Raises:
        UnsupportedError, UserInputError: see `model_class`; or the configuration is refused.
    """
    kind = model_class(folder)
    config = read_config(kind, folder)
    accelerate = require("accelerate", extra="hf", purpose="build a model without weights")
    dtype: torch.dtype | None = getattr(config, "dtype", None)
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            model = new_model(kind, config, dtype)
    except Exception as error:  # transformers raises exceptions of many types
        raise _undescribed(folder, kind, error) from error
    keep_in_float32_(model, dtype)
    model.tie_weights()  # registering a parameter on the meta device has untied it
    return skeleton_of(model)


def as_skeleton(model: nn.Module | str | Path) -> nn.Module:
    """A model without weights, from the model or from a folder with its `config.json`."""
    return build_skeleton(Path(model)) if isinstance(model, (str, Path)) else skeleton_of(model)


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode, its parameters fake tensors; buffers are shared."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        with mode:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    return copy.deepcopy(model, memo).eval()
