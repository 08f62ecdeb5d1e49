"""Deferred tensors: their shapes are known now, their values are made when they are asked for.

A deferred tensor is a fake tensor (torch's own: shape, dtype and no memory) that carries a recipe:
a function of other tensors, deferred ones among them, or of a file. Passes work on it as on any
tensor, as long as they do the arithmetic on weights through `defer` and ask about values through
`holds`. An exporter asks for the values of one layer after another, so that a model larger than
memory can be quantized and written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qalora_compile.errors import InternalError

Compute = Callable[..., Mapping[str, Tensor]]
_RECIPE = "_qalora_recipe"


class Recipe:
    """How the values of some tensors are made: by one function, together."""

    def __init__(self, compute: Compute, inputs: tuple[Tensor, ...]) -> None:
        self._compute = compute
        self._inputs = inputs
        self._made: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """The values of one tensor; each is kept until it is taken, and made anew after that."""
        if name not in self._made:
            self._made = dict(self._compute(*map(materialize, self._inputs)))
        return self._made.pop(name)


def is_deferred(tensor: Tensor) -> bool:
    """Whether a tensor has no values yet."""
    return isinstance(tensor, FakeTensor)


def is_placeholder(tensor: Tensor) -> bool:
    """Whether a tensor will never have values: it stands for one of another program."""
    return is_deferred(tensor) and not hasattr(tensor, _RECIPE)


def defer(compute: Compute, *inputs: Tensor) -> dict[str, Tensor]:
    """`compute(*inputs)`, a dictionary of tensors, now or, if an input is deferred, later.

    For deferred inputs, `compute` is run on the fake tensors for the shapes and dtypes of its
    results: it must take no decision by their values but through `holds`.
    """
    modes = [tensor.fake_mode for tensor in inputs if isinstance(tensor, FakeTensor)]
    if not modes:
        return dict(compute(*inputs))
    recipe = Recipe(compute, inputs)
    with modes[0]:
        shown = [t if is_deferred(t) else modes[0].from_tensor(t) for t in inputs]
        made = {name: tensor.detach() for name, tensor in compute(*shown).items()}
    for name, tensor in made.items():
        setattr(tensor, _RECIPE, (recipe, name))
    return made


def defer_to(source: Callable[[], Tensor], like: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of `mode` with the shape and dtype of `like`, read from `source` when asked for."""
    with mode:
        tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    setattr(tensor, _RECIPE, (Recipe(lambda: {"": source()}, ()), ""))
    return tensor


def keep_recipe(source: Tensor, target: Any) -> Any:
    """Give `target`, another tensor object of the same values, the recipe of `source`."""
    if hasattr(source, _RECIPE):
        setattr(target, _RECIPE, getattr(source, _RECIPE))
    return target


def materialize(tensor: Tensor) -> Tensor:
    """The values of a tensor.

    Raises:
        InternalError: it is deferred and carries no recipe.
    """
    if not is_deferred(tensor):
        return tensor
    found = getattr(tensor, _RECIPE, None)
    if found is None:
        raise InternalError(f"a tensor of shape {list(tensor.shape)} was never given values")
    recipe, name = found
    values: Tensor = recipe.take(name)
    if values.shape != tensor.shape or values.dtype != tensor.dtype:
        raise InternalError(
            f"a tensor of shape {list(tensor.shape)}, {tensor.dtype}, was given values of shape "
            f"{list(values.shape)}, {values.dtype}"
        )
    return values


def holds(condition: Tensor, *, unknown: bool = True) -> bool:
    """Whether a condition on values holds; `unknown` where they are deferred.

    What is not known to be false when a pass runs is asked again when the values are made: the
    functions that are given to `defer` run twice.
    """
    return unknown if is_deferred(condition) else bool(condition)
