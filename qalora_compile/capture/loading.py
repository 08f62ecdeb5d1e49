"""What transformers makes of a checkpoint that does not say quite what its `config.json` says.

`from_pretrained` gives parameters that the files lack random values, and passes over tensors that
the model has no place for. Here, a missing parameter is refused, and so is half a model.
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
    """Give the parameters that the architecture keeps in float32 that dtype, in place.

    Args:
        model: Of transformers, its parameters without values.
        dtype: What the others have.
    """
    names = kept_in_float32(model, dtype)
    patterns = [re.compile(re.escape(name).replace(r"\*", ".*")) for name in names]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and any(p.search(name) for p in patterns):
            parameter.data = parameter.data.float()


def unreadable(path: Path, error: Exception) -> UserInputError:
    """What to say of a model that a library could not load."""
    text = str(error).strip().splitlines()
    return UserInputError(
        f"cannot load {path.name}: {type(error).__name__}: {text[0] if text else 'no message'}",
        where=str(path),
        hint="the file may be truncated or of an unsupported kind: fetch it again",
    )


def check_report(report: Mapping[str, Any], model: Any, where: Path) -> None:
    """Refuse a model that did not find all of its tensors, or left layers of the checkpoint.

    Args:
        report: Of transformers (`output_loading_info`).
        model: What was loaded.
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
            f"{name} is {list(stored)} in the files, and {list(wanted)} by config.json",
            where=str(where),
            hint="config.json is of another model, or was edited",
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

    Other tensors without a place are passed over, as transformers does: rotary tables of older
    versions, heads of another task.

    Args:
        stored: Names of the tensors in the files.
        model: Of transformers.
        where: The folder.

    Raises:
        UserInputError: a name is that of a parameter of the model in a layer that it has not.
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
                hint="config.json says fewer layers than the files hold: it is of another model, "
                "or was edited",
            )
