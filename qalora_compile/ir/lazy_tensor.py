"""Deferred tensors: shapes are known at once, values are computed when they are asked for.

A deferred tensor is one of torch's fake tensors (shape and dtype, no memory) that carries a recipe:
a function of other tensors, which may be deferred too, or of a file. Passes work on it as on any
tensor, as long as they do arithmetic on weights through `defer` and test values through `holds`. An
exporter asks for the values of one layer at a time, so a model larger than memory can be quantized
and written.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qalora_compile.errors import InternalError
from qalora_compile.ir.torch_internals import FakeTensor, FakeTensorMode

Compute = Callable[..., Mapping[str, Tensor]]
ReadRows = Callable[[int, int], Tensor]
"""Rows `start` to `stop` of a tensor."""
_RECIPE = "_qalora_recipe"
_PART_ELEMENTS = 1 << 22
"""Elements that are computed at a time, where a tensor is computed by rows."""
_KEPT_SHARE = 2
"""A tensor is kept while another, at least this many times as large, is computed in parts."""


class Recipe:
    """The recipe of some tensors, which one function computes together.

    Args:
        compute: The function.
        inputs: What it is given.
        by_rows: Given some rows of the inputs, it computes the same rows of the results.
    """

    def __init__(
        self, compute: Compute, inputs: tuple[Tensor, ...], *, by_rows: bool = False
    ) -> None:
        self._compute = compute
        self.inputs = inputs
        self._made: dict[str, Tensor] = {}
        self._span = (0, 0)
        self._part: dict[str, Tensor] = {}
        self.by_rows = by_rows and all(map(_has_rows, inputs))

    def take(self, name: str) -> Tensor | None:
        """The values of one tensor; each is kept until it is taken, and then computed again.

        None if the function leaves the tensor out, now that it has values: it is all zero.
        """
        if name not in self._made:
            self._made = dict(self._compute(*map(materialize, self.inputs)))
        return self._made.pop(name, None)

    def take_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor; those of the others are kept until rows elsewhere are taken."""
        if self._span != (start, stop) or name not in self._part:
            given = [_rows(tensor, start, stop) for tensor in self.inputs]
            self._span, self._part = (start, stop), dict(self._compute(*given))
        return self._part.pop(name)

    def take_parts(self, name: str, rows: int, step: int) -> Iterator[Tensor]:
        """All rows of one tensor, `step` at a time; much smaller tensors are kept on the way."""
        if name in self._made:
            yield self._made.pop(name)
            return
        kept: dict[str, list[Tensor]] = {}
        for start in range(0, rows, step):
            part = self.take_rows(name, start, min(start + step, rows))
            for other, values in self._part.items():
                if values.nbytes * _KEPT_SHARE <= part.nbytes:
                    kept.setdefault(other, []).append(values)
            self._part = {}
            yield part
        self._made |= {other: torch.cat(parts) for other, parts in kept.items()}


class FileRecipe(Recipe):
    """How one tensor is read from a file: completely, or some of its rows."""

    def __init__(self, source: Callable[[], Tensor], read_rows: ReadRows | None) -> None:
        super().__init__(lambda: {"": source()}, ())
        self._read_rows = read_rows
        self.by_rows = read_rows is not None

    def take_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of the tensor."""
        assert self._read_rows is not None, "it was asked for rows without `by_rows`"
        return self._read_rows(start, stop)


def is_lazy(tensor: Tensor) -> bool:
    """Whether a tensor has no values yet."""
    return isinstance(tensor, FakeTensor)


def is_placeholder(tensor: Tensor) -> bool:
    """Whether a tensor will never have values: it stands for one of another program."""
    return is_lazy(tensor) and not hasattr(tensor, _RECIPE)


def is_stored(tensor: Tensor) -> bool:
    """Whether the values of a tensor are in memory or in a file, so that no pass computes them."""
    recipe, _ = getattr(tensor, _RECIPE, (None, ""))
    return not is_lazy(tensor) or isinstance(recipe, FileRecipe)


Seen = dict[Hashable, dict[str, Tensor]]
"""Results on the meta device, by what they depend on."""


def defer(
    compute: Compute,
    *inputs: Tensor,
    by_rows: bool = False,
    seen: Seen | None = None,
    key: Hashable = None,
) -> dict[str, Tensor]:
    """The tensors of `compute(*inputs)`: computed now or, if an input is deferred, later.

    If an input is deferred, `compute` runs on fake tensors for the shapes and dtypes of its
    results, so it may only make decisions on values through `holds`. A tensor that it then leaves
    out, computed on values, is all zero.

    Args:
        compute: Makes the tensors.
        inputs: What it is given.
        by_rows: Every input and result has the same number of rows, and `compute` of some rows of
            the inputs gives those rows of the results. Large results are then computed in parts.
        seen: A cache that the caller keeps over many calls: `compute` is not run again on fake
            tensors where the key and the shapes and dtypes of the inputs are those of an earlier
            call. A model has many layers of few shapes.
        key: Anything else that the results' shapes depend on.
    """
    modes = [tensor.fake_mode for tensor in inputs if isinstance(tensor, FakeTensor)]
    if not modes:
        return dict(compute(*inputs))
    recipe = Recipe(compute, inputs, by_rows=by_rows)
    full = (key, *((tensor.shape, tensor.dtype) for tensor in inputs))
    seen = {} if seen is None else seen
    with modes[0]:
        if full not in seen:
            shown = [t if is_lazy(t) else modes[0].from_tensor(t) for t in inputs]
            seen[full] = {name: t.to("meta") for name, t in compute(*shown).items()}
        made = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
            for name, t in seen[full].items()
        }
    for name, tensor in made.items():
        setattr(tensor, _RECIPE, (recipe, name))
    return made


def make_lazy(
    source: Callable[[], Tensor],
    like: Tensor,
    mode: FakeTensorMode,
    read_rows: ReadRows | None = None,
) -> Tensor:
    """A tensor of `mode` with the shape and dtype of `like`, read from `source` when asked for.

    With `read_rows` it can also be read some rows at a time.
    """
    with mode:
        tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    setattr(tensor, _RECIPE, (FileRecipe(source, read_rows), ""))
    return tensor


def keep_recipe(source: Tensor, target: Any) -> Any:
    """Give `target`, another tensor object of the same values, the recipe of `source`."""
    if hasattr(source, _RECIPE):
        setattr(target, _RECIPE, getattr(source, _RECIPE))
    return target


def forget_recipe(tensor: Tensor) -> None:
    """Drop the recipe of a deferred tensor: asking for its values is an error from now on."""
    if hasattr(tensor, _RECIPE):
        delattr(tensor, _RECIPE)


def materialize(tensor: Tensor) -> Tensor:
    """The values of a tensor.

    Raises:
        InternalError: it is deferred and carries no recipe.
    """
    if not is_lazy(tensor):
        return tensor
    found = getattr(tensor, _RECIPE, None)
    if found is None:
        raise InternalError(f"a tensor of shape {list(tensor.shape)} was never given values")
    recipe, name = found
    values: Tensor | None = recipe.take(name)
    if values is None:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    _check_values(tensor, list(values.shape), values.dtype)
    return values


def materialize_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The values of a tensor, in successive parts of its rows where it can be computed by rows.

    Raises:
        InternalError: it is deferred and carries no recipe.
    """
    found = getattr(tensor, _RECIPE, None)
    if not is_lazy(tensor) or found is None or not _has_rows(tensor):
        yield materialize(tensor)
        return
    recipe, name = found
    step, seen = max(1, _PART_ELEMENTS // max(1, _row_width(tensor))), 0
    for part in recipe.take_parts(name, tensor.shape[0], step):
        seen += part.shape[0]
        _check_values(tensor, [tensor.shape[0], *part.shape[1:]], part.dtype)
        yield part
    _check_values(tensor, [seen, *tensor.shape[1:]], tensor.dtype)


def _check_values(tensor: Tensor, shape: list[int], dtype: torch.dtype) -> None:
    """Whether values of some shape and dtype are those of a deferred tensor."""
    if shape != list(tensor.shape) or dtype != tensor.dtype:
        raise InternalError(
            f"a tensor of shape {list(tensor.shape)}, {tensor.dtype}, was given values of shape "
            f"{shape}, {dtype}"
        )


def _row_width(tensor: Tensor) -> int:
    """Elements of a row of the widest tensor that goes into a row of this one."""
    found = getattr(tensor, _RECIPE, None)
    inputs = found[0].inputs if is_lazy(tensor) and found is not None else ()
    own = tensor.numel() // max(1, tensor.shape[0])
    return max([own, *map(_row_width, inputs)])


def _has_rows(tensor: Tensor) -> bool:
    """Whether some rows of a tensor can be had without the others."""
    if tensor.dim() == 0 or not is_lazy(tensor):
        return tensor.dim() > 0
    found = getattr(tensor, _RECIPE, None)
    return found is not None and found[0].by_rows


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    if not is_lazy(tensor):
        return tensor[start:stop]
    recipe, name = getattr(tensor, _RECIPE)
    rows: Tensor = recipe.take_rows(name, start, stop)
    return rows


def holds(condition: Tensor, *, unknown: bool = True) -> bool:
    """Whether a condition on values holds; `unknown` where they are deferred.

    A condition that was unknown when a pass ran is tested again when the values are computed,
    because the functions given to `defer` run twice.
    """
    return unknown if is_lazy(condition) else bool(condition)
