"""Checks how transformers loaded a checkpoint that deviates from its `config.json`.

`from_pretrained` initializes missing parameters at random and ignores tensors without a parameter
in the model. Here, a missing parameter is refused, and so are layers that the model lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qalora_compile.capture.transformers_internals import ignored_keys, kept_in_float32
from qalora_compile.errors import UserInputError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def keep_in_float32_(model: Any, dtype: torch.dtype | None) -> None:
    """Cast the parameters that the architecture keeps in float32 to that dtype, in place.

    Args:
        model: A transformers model whose parameters have no values.
        dtype: The dtype of the others.
    """
    names = kept_in_float32(model, dtype)
    patterns = [re.compile(re.escape(name).replace(r"\*", ".*")) for name in names]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and any(p.search(name) for p in patterns):
            parameter.data = parameter.data.float()


def unreadable(path: Path, error: Exception) -> UserInputError:
    """The error for a model that a library failed to load."""
    text = str(error).strip().splitlines()
    return UserInputError(
        f"cannot load {path.name}: {type(error).__name__}: {text[0] if text else 'no message'}",
        where=str(path),
        hint="the file may be truncated or of an unsupported kind: fetch it again",
    )


def check_report(report: Mapping[str, Any], model: Any, where: Path) -> None:
    """Refuse a model with missing tensors, or without some layers of the checkpoint.

    Args:
        report: Report of transformers (`output_loading_info`).
        model: The loaded model.
        where: The folder.

    Raises:
        UserInputError: a parameter would be random, or a layer is missing from the model.
    """
    missing, unknown = (
        sorted(map(str, report[f"{key}_keys"])) for key in ("missing", "unexpected")
    )
    refuse_extra_layers(unknown, model, where)
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise UserInputError(
            f"{name} is {list(stored)} in the files, but {list(wanted)} by config.json",
            where=str(where),
            hint="config.json belongs to another model, or was edited",
        )
    if not missing:
        return
    besides = f", and has an unknown {unknown[0]}" if unknown else ""
    raise UserInputError(
        f"the checkpoint has no tensor {missing[0]} ({len(missing)} in all){besides}",
        where=str(where),
        hint="config.json may name another architecture, or not say that the weights are "
        "quantized (quantization_config)",
    )


def refuse_extra_layers(stored: Iterable[str], model: Any, where: Path) -> None:
    """Refuse a checkpoint with layers that the model does not have.

    Other unknown tensors are ignored, as in transformers: rotary tables of older versions, heads of
    another task.

    Args:
        stored: Names of the tensors in the files.
        model: A transformers model.
        where: The folder.

    Raises:
        UserInputError: a tensor is a known parameter of a layer that the model does not have.
    """
    known = set(model.state_dict())
    kinds = {_NUMBER.sub("#", name) for name in known}
    free = [re.compile(p) for p in ignored_keys(model)]
    for name in sorted(stored):
        if name in known or _NUMBER.sub("#", name) not in kinds:
            continue
        if not any(pattern.search(name) for pattern in free):
            raise UserInputError(
                f"the checkpoint has {name}, a layer that the model does not have",
                where=str(where),
                hint="config.json states fewer layers than the files hold: it is of another model, "
                "or was edited",
            )
