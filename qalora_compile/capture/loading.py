"""What transformers makes of a checkpoint that does not say quite what its `config.json` says.

`from_pretrained` casts weights to one dtype, leaves a head untied that has weights of its own, and
passes over tensors that the model has no place for. The reader of weights that stay in their files
(`capture.checkpoint`) does the same, but for layers that the model lacks: half a model is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.errors import UserInputError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def checkpoint_dtype(config: Any, stored: Mapping[str, Tensor]) -> torch.dtype | None:
    """The dtype that all floats are cast to: the configuration's, or that of the first tensor.

    Args:
        config: Of transformers.
        stored: The tensors of the checkpoint by name, in the order of the files.
    """
    if getattr(config, "dtype", None) is not None:
        found: torch.dtype = config.dtype
        return found
    return next((t.dtype for t in stored.values() if t.is_floating_point()), None)


def keep_in_float32_(model: Any, dtype: torch.dtype | None) -> None:
    """Give the parameters that the architecture keeps in float32 that dtype, in place.

    Args:
        model: Of transformers, its parameters without values.
        dtype: What the others have.
    """
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    elif dtype is not torch.bfloat16:
        return
    patterns = [re.compile(re.escape(name).replace(r"\*", ".*")) for name in names]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and any(p.search(name) for p in patterns):
            parameter.data = parameter.data.float()


def untie_(model: nn.Module, names: Iterable[str]) -> None:
    """Give parameters of a model without values memory of their own, in place."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        empty = torch.empty_like(getattr(owner, leaf))
        setattr(owner, leaf, nn.Parameter(empty, requires_grad=False))


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
    free = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
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
