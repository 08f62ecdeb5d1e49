"""`describe`: configuration, tensor names and tokenizer of a model, for exporters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qalora_compile.capture.sizes import check_gguf_sizes
from qalora_compile.capture.skeleton import build_skeleton, skeleton_of, transformers_module
from qalora_compile.capture.transformers_internals import rope_frequencies
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.model_description import Description
from qalora_compile.optional import require
from qalora_compile.untrusted import read_json
from qalora_compile.untrusted.gguf_header import check_gguf
from qalora_compile.untrusted.tokenizer import has_tokenizer

METADATA_FILE = "metadata.gguf"
"""A file next to `config.json` with the metadata of the GGUF file that the model came from."""
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
_LLAMA3 = "llama3"


def model_config(model: Any) -> dict[str, Any] | None:
    """`config.json` of a transformers model, with its class; None for any other model."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or not type(model).__module__.startswith("transformers."):
        return None
    # as transformers writes it: Mamba's limits are infinite, which JSON cannot represent
    value = json.loads(config.to_json_string()) | {"architectures": [type(model).__name__]}
    if getattr(config, "tie_word_embeddings", False) and _has_own_head(model):
        value["tie_word_embeddings"] = False
    return {k: v for k, v in value.items() if k not in ("quantization_config", "use_cache")}


def _has_own_head(model: Any) -> bool:
    """Whether a language model's head does not share the embedding's weights, by its tensors."""
    if not hasattr(model, "get_output_embeddings"):
        return False
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(table, nn.Embedding):
        return False
    return head.weight is not table.weight and head.weight.shape == table.weight.shape


def describe(model: nn.Module | str | Path, *, tokenizer: str | Path | None = None) -> Description:
    """Describe a transformers model without its weights, none of which is read.

    Args:
        model: The model, a folder with its `config.json`, or a `.gguf` file.
        tokenizer: Folder with the tokenizer's files; by default the folder of the model, if it has
            them.

    Raises:
        UnsupportedError: it is not a transformers model.
        UserInputError: a folder or `config.json` is missing or malformed.
    """
    if isinstance(model, nn.Module):
        config = model_config(model)
        if config is None:
            raise UnsupportedError(
                f"{type(model).__name__} is not a transformers model and cannot be described",
                hint="leave the model out: target 'float' or 'safetensors' needs no description",
            )
        generation = getattr(model, "generation_config", None)
        described = None if generation is None else generation.to_diff_dict()
        return _description(skeleton_of(model), config, described, _folder(tokenizer), None)
    path = Path(model)
    if path.suffix == ".gguf":
        config, skeleton = _from_gguf(path)
        return _description(skeleton, config, None, _folder(tokenizer), path)
    skeleton = build_skeleton(path)
    found = _folder(tokenizer if tokenizer is not None or not has_tokenizer(path) else path)
    generation_file, metadata = path / GENERATION_FILE, path / METADATA_FILE
    return _description(
        skeleton,
        read_json(path / CONFIG_FILE),
        read_json(generation_file) if generation_file.is_file() else None,
        found,
        metadata if metadata.is_file() else None,
    )


def _description(
    skeleton: nn.Module,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    tokenizer: Path | None,
    gguf: Path | None,
) -> Description:
    state = skeleton.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            ties[name] = owner
    settings: Any = skeleton.config
    return Description(
        config={k: v for k, v in config.items() if k != "quantization_config"},
        settings=settings.to_dict(),
        shapes={n: tuple(t.shape) for n, t in state.items() if n not in ties},
        ties=ties,
        generation=generation,
        tokenizer=tokenizer,
        gguf=gguf,
        rotary_frequencies=_frequencies(settings),
    )


def _frequencies(settings: Any) -> tuple[float, ...]:
    """The frequencies of rotary embeddings of type `llama3`, which are not a geometric series."""
    if (getattr(settings, "rope_parameters", None) or {}).get("rope_type") != _LLAMA3:
        return ()
    return tuple(rope_frequencies(settings, _LLAMA3, torch.device("cpu")).tolist())


def _folder(tokenizer: str | Path | None) -> Path | None:
    if tokenizer is None:
        return None
    if not has_tokenizer(Path(tokenizer)):
        raise UserInputError(
            f"{tokenizer} holds no tokenizer", where=str(tokenizer), hint="give its folder"
        )
    return Path(tokenizer)


def _from_gguf(path: Path) -> tuple[dict[str, Any], nn.Module]:
    """Configuration and skeleton of the model in a GGUF file."""
    if not path.is_file():
        raise UserInputError(f"there is no file {path}", where=str(path))
    check_gguf_sizes(check_gguf(path), path)
    transformers = transformers_module()
    accelerate = require("accelerate", extra="hf", purpose="build a model without weights")
    try:
        config = transformers.AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
        with accelerate.init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # the reader raises exceptions of many types
        raise UserInputError(
            f"{path.name} does not describe a transformers model: {type(error).__name__}: {error}",
            where=str(path),
        ) from error
    model.tie_weights()  # registering a parameter on the meta device has untied it
    value = model_config(model)
    assert value is not None
    return value, skeleton_of(model)
