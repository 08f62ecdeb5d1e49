"""Folders in the layout of Hugging Face: safetensors, `config.json`, tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qalora_compile.exporters.capability import StoredTensor
from qalora_compile.exporters.checkpoints.named_tensors import (
    WEIGHT,
    Checkpoint,
    Layer,
    check_half_range,
    stored_error,
)
from qalora_compile.files import write_json
from qalora_compile.ir.model_description import Description
from qalora_compile.untrusted import read_json
from qalora_compile.untrusted.artifacts import tokenizer_files

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
_PARTIAL = "partial_rotary_factor"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
"""A file of weights is closed before it becomes larger; memory holds one file at a time."""
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's files from a folder; returns False if there are none."""
    files = tokenizer_files(source)
    for file in files:
        shutil.copy2(file, target / file.name)
    return bool(files)


def widen_tokenizer_config(folder: Path) -> None:
    """Change `tokenizer_config.json` so that every client reads it.

    transformers.js takes the chat template from there, not from `chat_template.jinja`. Releases of
    transformers before 5 do not know `TokenizersBackend`, the class of any fast tokenizer in
    release 5; both know its earlier name.
    """
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not config.is_file():
        return
    value = read_json(config)
    if template.is_file():
        value.setdefault("chat_template", template.read_text("utf-8"))
    if value.get("tokenizer_class") == "TokenizersBackend":
        value["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(config, value)


def with_former_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` in which readers from before transformers 5 find the rotary embedding too.

    transformers 5 has one entry, `rope_parameters`. Others ask for `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`: without them mistral.rs refuses a model, and a reader with a default
    computes other angles. Entries that are there already stay. Parameters by kind of layer had no
    former names.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        return dict(config)
    former = {name: rope[name] for name in ("rope_theta", _PARTIAL) if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in former}
    if scaling.get("rope_type", "default") != "default":
        former["rope_scaling"] = scaling
    return former | dict(config)


class FolderWriter:
    """Writes the weights of a model file by file, then the files that describe them.

    Args:
        folder: An empty folder.
        tag: The framework that the files name in their metadata, `pt` or `mlx`.
        shard_bytes: The largest size of a file, unless a single tensor is larger.
    """

    def __init__(self, folder: Path, *, tag: str = "pt", shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._tag, self._limit = folder, tag, shard_bytes
        self._open: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; a copy of it is kept until its file is written."""
        size = tensor.numel() * tensor.element_size()
        if self._open and self._size + size > self._limit:
            self._close_shard()
        self._open[name] = tensor.detach().contiguous().clone()
        self._size, self._total = self._size + size, self._total + size

    def finish(
        self, description: Description | None, changes: Mapping[str, Any] | None = None
    ) -> None:
        """Write the last file, the index if there are several, configuration and tokenizer.

        Args:
            description: Of the model; None where nothing but the weights is known.
            changes: Entries of `config.json` that the format adds.
        """
        self._close_shard()
        self._name_shards()
        config = dict(description.config if description is not None else {}) | dict(changes or {})
        if config:
            write_json(self._folder / CONFIG_FILE, with_former_names(config))
        if description is None:
            return
        if description.generation is not None:
            write_json(self._folder / GENERATION_FILE, dict(description.generation))
        if description.tokenizer is not None:
            copy_tokenizer(description.tokenizer, self._folder)

    def _close_shard(self) -> None:
        path = self._folder / f".shard-{len(self._shards)}"
        save_file(self._open, path, metadata={"format": self._tag})
        self._shards.append(list(self._open))
        self._open, self._size = {}, 0

    def _name_shards(self) -> None:
        count = len(self._shards)
        if count == 1:
            (self._folder / ".shard-0").rename(self._folder / WEIGHTS_FILE)
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f".shard-{number}").rename(self._folder / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": places}
        write_json(self._folder / INDEX_FILE, index)


def add_layer_as_floats(
    writer: FolderWriter, layer: Layer, dtype: torch.dtype, remark: str = ""
) -> StoredTensor:
    """Add the weight of a layer on codes as floats, as the model stores it.

    Raises:
        UserInputError: float16 cannot hold a value.
    """
    weight = layer.weight()
    values = weight.t() if layer.site.transposed else weight
    return add_float(writer, f"{layer.name}{WEIGHT}", layer.name, values, dtype, remark)


def add_floats(
    writer: FolderWriter, checkpoint: Checkpoint, dtype: torch.dtype
) -> Iterator[StoredTensor]:
    """Add every tensor that is not on codes; those of floats in `dtype`.

    Raises:
        UserInputError: float16 cannot hold a value.
    """
    for name, values in checkpoint.float_values():
        yield add_float(writer, name, name, values, dtype)


def add_float(
    writer: FolderWriter,
    name: str,
    source: str,
    values: Tensor,
    dtype: torch.dtype,
    remark: str = "",
) -> StoredTensor:
    """Add one tensor; a floating one in `dtype`.

    Raises:
        UserInputError: float16 cannot hold a value.
    """
    if not values.is_floating_point():
        writer.add(name, values)
        return StoredTensor(name, source, str(values.dtype).removeprefix("torch."))
    if dtype == torch.float16:
        check_half_range(source, "tensor", values)
    stored = values.to(dtype)
    writer.add(name, stored)
    return stored_error(name, source, str(dtype).removeprefix("torch."), stored, values, remark)
