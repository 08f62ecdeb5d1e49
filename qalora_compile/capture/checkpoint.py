"""Hugging Face checkpoints whose weights stay in their files until they are asked for."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.capture.encoder_decoder import capture_whole, is_encoder_decoder
from qalora_compile.capture.loading import refuse_extra_layers, untie_
from qalora_compile.capture.skeleton import build_skeleton, generates
from qalora_compile.capture.text_encoder import capture_text_encoder
from qalora_compile.errors import UserInputError
from qalora_compile.ir.deferred import defer_to, is_deferred, keep_recipe
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import dtype_name
from qalora_compile.ir.storage import read_headers, read_rows, read_tensor
from qalora_compile.untrusted import member, read_json

_INDEX = "model.safetensors.index.json"


def capture_checkpoint(folder: Path, *, last_logits: bool = False) -> Program:
    """A model that reads tokens from its folder, with deferred weights.

    A decoder-only one that generates has its key-value cache; one with an encoder too is captured
    as one forward of whole sequences, to be split when it is quantized
    (`api.split_encoder_decoder`); an encoder alone as its one forward.

    Memory does not grow with the model: nothing is read but the headers of the files. Passes run on
    shapes, and an exporter reads, quantizes and writes one layer after another.

    Args:
        folder: `config.json` and safetensors, one file or several with an index.
        last_logits: As for `capture_causal_lm`; of no effect with an encoder.

    Raises:
        UserInputError: a file is missing or broken, or a tensor is missing or of another shape.
        UnsupportedError: the architecture is none of transformers, or has no such cache.
        CaptureError: `torch.export` refused the model.
    """
    stored = _read_headers(folder)
    skeleton = build_skeleton(folder, {name: row.like for name, row in stored.items()})
    refuse_extra_layers(stored, skeleton, folder)
    notes = _untie(skeleton, stored)
    names = _stored_names(skeleton, stored)
    if is_encoder_decoder(skeleton):
        program = capture_whole(skeleton)
    elif not generates(folder):
        program = capture_text_encoder(skeleton)
    else:
        program = capture_causal_lm(skeleton, last_logits=last_logits)
    tensors = program.tensors()
    persistent = skeleton.state_dict()  # with buffers: BART has trained ones
    made: dict[str, Tensor] = {}
    cast: dict[tuple[torch.dtype, torch.dtype], set[str]] = defaultdict(set)
    for name, tensor in tensors.items():
        if is_deferred(tensor) or (name in stored and name in persistent):
            key = names.get(name, name)
            if key not in made:
                made[key] = _defer(stored, key, tensor, folder)
            tensors[name] = made[key]
            cast[stored[key].like.dtype, tensor.dtype].add(key)
    notes += [
        f"{len(keys)} tensors are {dtype_name(a)} in the files and {dtype_name(b)} by config.json: "
        "cast, as transformers does"
        for (a, b), keys in cast.items()
        if a != b
    ]
    made_of = program.evolve(graph=program.copy_graph(), tensors=tensors)
    return dataclasses.replace(made_of, notes=(*program.notes, *notes))


def _untie(model: nn.Module, stored: Mapping[str, _Stored]) -> list[str]:
    """Untie what the files hold several different tensors for; a note for each.

    `tie_word_embeddings` of a configuration is often left from the base of a model whose head was
    trained and stored (PEFT's `modules_to_save`, merges).
    """
    notes = []
    for tied in _tied_names(model):
        first, *others = [name for name in tied if name in stored] or [""]
        apart = [name for name in others if not _equal(stored[first], first, stored[name], name)]
        untie_(model, apart)
        notes += [
            f"{name} is tied to {first} by config.json, and the files hold another tensor for it: "
            "both are used, as transformers does"
            for name in apart
        ]
    return notes


def _tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter: several where it is tied."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return list(names.values())


def _equal(a: _Stored, first: str, b: _Stored, second: str) -> bool:
    return a.like.shape == b.like.shape and torch.equal(
        read_tensor(a.path, first), read_tensor(b.path, second)
    )


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, and what its header says."""

    path: Path
    like: Tensor


def _read_headers(folder: Path) -> dict[str, _Stored]:
    """Every tensor of a checkpoint, by name; opens each file once.

    Raises:
        UserInputError: there is none, or one of its files is missing or broken; it is named.
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
    found: dict[str, _Stored] = {}
    for path in files:
        found |= {name: _Stored(path, like) for name, like in read_headers(path).items()}
    return found


def _stored_names(model: nn.Module, stored: Container[str]) -> dict[str, str]:
    """Parameter → the name under which it is stored, which for a tie may be another's."""
    found: dict[str, str] = {}
    for tied in _tied_names(model):
        owner = next((name for name in tied if name in stored), tied[0])
        found |= dict.fromkeys(tied, owner)
    return found


def _defer(stored: dict[str, _Stored], name: str, wanted: Tensor, folder: Path) -> Tensor:
    """The parameter `name`, to be read from its file.

    Raises:
        UserInputError: it is not there, or is of another shape than the model says, or of integers
            where that says floats.
    """
    found = stored.get(name)
    if found is None:
        raise UserInputError(
            f"the checkpoint has no tensor {name}",
            where=str(folder),
            hint="its names are not those of the model's parameters: load it with transformers "
            "and save it again, which renames them",
        )
    like = found.like
    floats = like.is_floating_point() and wanted.is_floating_point()
    if like.shape != wanted.shape or (like.dtype != wanted.dtype and not floats):
        raise UserInputError(
            f"{name} is {like.dtype} {list(like.shape)} in {found.path.name}, and "
            f"{wanted.dtype} {list(wanted.shape)} by config.json",
            where=str(found.path),
        )
    if not isinstance(wanted, FakeTensor):
        return read_tensor(found.path, name).to(wanted.dtype)
    tensor = defer_to(
        lambda: read_tensor(found.path, name).to(wanted.dtype),
        wanted,
        wanted.fake_mode,
        lambda start, stop: read_rows(found.path, name, start, stop).to(wanted.dtype),
    )
    parameter: Tensor = keep_recipe(tensor, nn.Parameter(tensor, requires_grad=False))
    return parameter
