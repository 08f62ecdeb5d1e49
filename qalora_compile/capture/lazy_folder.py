"""Captures Hugging Face checkpoints whose weights stay in their files until they are needed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.capture.encoder_decoder import capture_full_forward, is_encoder_decoder
from qalora_compile.capture.lazy_loading import Casts, LazyTensor, load_lazily
from qalora_compile.capture.loading import check_report, unreadable
from qalora_compile.capture.skeleton import model_class, read_config
from qalora_compile.capture.text_model import capture_text_model
from qalora_compile.capture.transformers_internals import untied_weights
from qalora_compile.errors import QaloraError, UnsupportedError, UserInputError
from qalora_compile.ir.lazy_tensor import is_lazy, is_placeholder, materialize
from qalora_compile.ir.program import Program
from qalora_compile.ir.safetensors_io import read_headers, read_rows, read_tensor
from qalora_compile.ir.signature import dtype_name
from qalora_compile.ir.torch_internals import FakeTensorMode
from qalora_compile.untrusted import member, read_json

_INDEX = "model.safetensors.index.json"


def capture_checkpoint(
    folder: Path, *, last_logits: bool | None = False, cache: bool = True
) -> Program:
    """Capture a model that reads tokens from its folder, with lazy weights.

    A decoder-only model is captured with its key-value cache. A model with encoder and decoder is
    captured as one forward pass of complete sequences, which `api.split_encoder_decoder` can split
    later; an encoder alone is one forward pass.

    Only the headers of the files are read, so that memory does not grow with the model. Passes run
    on shapes, and an exporter reads, quantizes and writes one layer at a time.

    Args:
        folder: `config.json` and safetensors, one file or several with an index.
        last_logits: As for `capture_causal_lm`; no effect on models with an encoder.
        cache: Capture a decoder-only model with its key-value cache.

    Raises:
        UserInputError: a file is missing or broken, or a tensor is missing or has another shape.
        UnsupportedError: transformers lacks the architecture, or it has no such cache.
        CaptureError: `torch.export` refused the model.
    """
    loaded = load_checkpoint(folder)
    if is_encoder_decoder(loaded.model):
        program = capture_full_forward(loaded.model)
    elif not cache or not loaded.model.can_generate():
        program = capture_text_model(loaded.model)
    else:
        program = capture_causal_lm(loaded.model, last_logits=last_logits)
    tensors = program.tensors()
    own = dict(loaded.model.named_parameters(remove_duplicate=False))
    tensors |= {name: own[name] for name, tensor in tensors.items() if is_lazy(tensor)}
    made_of = program.evolve(graph=program.copy_graph(), tensors=tensors)
    return dataclasses.replace(made_of, notes=(*program.notes, *loaded.notes))


@dataclass(frozen=True)
class Loaded:
    """A transformers model with lazy weights.

    Attributes:
        model: The model in evaluation mode; its buffers have values.
        notes: Notes on differences between checkpoint and configuration.
    """

    model: Any
    notes: tuple[str, ...]


def load_checkpoint(folder: Path) -> Loaded:
    """The model that transformers loads from a folder, with its weights left in the files.

    Raises:
        UserInputError, UnsupportedError: see `capture_checkpoint`.
    """
    kind = model_class(folder)
    config = read_config(kind, folder)
    casts: Casts = Counter()
    stored = _read_headers(folder, casts)
    try:
        model, report = load_lazily(kind, config, stored)
    except QaloraError:
        raise
    except Exception as error:  # transformers raises exceptions of many types
        raise unreadable(folder, error) from error
    check_report(report, model, folder)
    for name, parameter in model.named_parameters():
        if is_placeholder(parameter):
            raise UnsupportedError(
                f"transformers computes {name} in place from other tensors of the checkpoint",
                where=str(folder),
                hint="load the model with transformers, and give it to qc.capture_model",
            )
    for name, buffer in list(model.named_buffers()):
        if is_lazy(buffer):
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, materialize(buffer))
    return Loaded(model, (*_untied(model), *_cast(casts)))


def _untied(model: Any) -> list[str]:
    """A note for each tensor that the configuration ties but the files store separately.

    `tie_word_embeddings` is often inherited from the base of a model whose head was trained and
    stored (PEFT's `modules_to_save`, merges).
    """
    return [
        f"{name} is tied to {owner} by config.json, but the files hold another tensor for it: "
        "both are used, as transformers does"
        for name, owner in untied_weights(model).items()
    ]


def _cast(casts: Casts) -> list[str]:
    return [
        f"{count} tensors are {dtype_name(stored)} in the files and {dtype_name(wanted)} by "
        "config.json: cast, as transformers does"
        for (stored, wanted), count in casts.items()
    ]


def _read_headers(folder: Path, casts: Casts) -> Mapping[str, LazyTensor]:
    """Every tensor of a checkpoint, by name; each file is opened once.

    Args:
        folder: Contains one safetensors file, or several with an index.
        casts: Counts the tensors that are read in another dtype.

    Raises:
        UserInputError: a file is missing or broken; the error names it.
    """
    if (folder / _INDEX).is_file():
        value = read_json(folder / _INDEX)
        wanted = value.get("weight_map") if isinstance(value, dict) else None
        if not isinstance(wanted, dict):
            raise UserInputError(f"{_INDEX} has no weight_map", where=str(folder / _INDEX))
        if not all(isinstance(name, str) for name in wanted.values()):
            raise UserInputError(f"{_INDEX} names no files", where=str(folder / _INDEX))
        files = [member(folder, name) for name in dict.fromkeys(wanted.values())]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserInputError(
            "the folder holds no safetensors file",
            where=str(folder),
            hint="convert once with model.save_pretrained(folder), which writes safetensors",
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def lazy(path: Path, name: str, like: Tensor) -> LazyTensor:
        read, rows = partial(read_tensor, path, name), partial(read_rows, path, name)
        return LazyTensor(name, like, mode, read, rows, casts)

    return {
        name: lazy(path, name, like) for path in files for name, like in read_headers(path).items()
    }
