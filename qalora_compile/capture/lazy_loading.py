"""Runs transformers' own loader on tensors that stay in their files.

`from_pretrained` renames, splits, stacks and transposes tensors by the conversion rules of the
architecture, casts them, ties and unties them. Here it gets tensors without values, and a mode
records each operation on them as a recipe (`ir.lazy_tensor`), which is run when a layer is needed.
No rule of transformers is repeated in this project.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qalora_compile.capture.transformers_internals import load_in_one_thread
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.lazy_tensor import (
    ReadRows,
    defer,
    forget_recipe,
    is_lazy,
    is_placeholder,
    make_lazy,
    materialize,
)
from qalora_compile.ir.signature import dtype_name
from qalora_compile.ir.torch_internals import (
    LOCAL_SCALAR,
    TO_COPY,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    pytree,
    schema_of,
)

_aten = torch.ops.aten
_OF_VALUES = (_aten.equal.default, LOCAL_SCALAR)
"""Operators that need values and do not return a tensor."""
_VIEWED = "_qalora_viewed"
_MOST_MADE = 1 << 28
"""The most bytes of a parameter that transformers computes, such as a table of positions."""


Casts = Counter[tuple[torch.dtype, torch.dtype]]
"""Number of casts by source and target dtype."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint, with the interface that transformers' loader uses.

    Args:
        name: In the checkpoint.
        like: A tensor of the same shape and dtype, without values.
        mode: The mode of its fake tensors.
        read: Reads it.
        read_rows: Reads some of its rows.
        casts: Counts the casts by source and target dtype.
    """

    name: str
    like: Tensor
    mode: FakeTensorMode
    read: Callable[[], Tensor]
    read_rows: ReadRows
    casts: Casts

    def __getattr__(self, name: str) -> Any:
        """Attributes that need no values: `dtype`, `shape`, `is_floating_point`."""
        return getattr(self.like, name)

    def __getitem__(self, index: Any) -> LazyTensor:
        """The complete tensor; transformers reads parts only with several devices."""
        if index is not Ellipsis:
            raise UnsupportedError(f"transformers reads parts of {self.name}", where=self.name)
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """The lazy tensor, which is cast when it is read.

        Raises:
            UserInputError: only one of the stored and the model's dtypes is floating.
        """
        wanted, own = dtype or self.like.dtype, self.like.dtype
        if wanted.is_floating_point != own.is_floating_point:
            raise UserInputError(
                f"{self.name} is {dtype_name(own)} in the files, and {dtype_name(wanted)} by "
                "config.json",
                where=self.name,
                hint="integer weights must be described by a quantization_config",
            )
        if wanted != own:
            self.casts[own, wanted] += 1
        return make_lazy(
            lambda: self.read().to(wanted),
            self.like.to(wanted),
            self.mode,
            lambda start, stop: self.read_rows(start, stop).to(wanted),
        )


class _Recorder(TorchDispatchMode):
    """Records every operation on a lazy tensor as the recipe of its results."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self._made = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        like, *_ = (*args, None)
        if func is _aten.empty_like.default and isinstance(like, nn.Parameter):
            # A parameter that the checkpoint lacks. Computed tables are allocated; a checkpoint
            # that lacks more is refused after `from_pretrained`, and takes no memory.
            self._made += like.nbytes
            if self._made > _MOST_MADE:
                with self._mode:
                    return torch.empty(like.shape, dtype=like.dtype)
        if not any(is_lazy(tensor) and not is_placeholder(tensor) for tensor in given):
            return func(*args, **kwargs)
        return _run(func, args, kwargs)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The results of an operation on lazy tensors, which are lazy tensors."""
    if func in _OF_VALUES:
        return func(*pytree.tree_map_only(Tensor, materialize, args), **kwargs)
    schema = schema_of(func)
    if schema.is_mutable:
        return _write(func, args, kwargs)
    if not all(str(each.type) in ("Tensor", "List[Tensor]") for each in schema.returns):
        return func(*args, **kwargs)  # a device, a size
    if func is _aten.stack.default:
        tensors, *dim = args
        if dim in ([], [0]):
            return _stack(list(tensors))
    return _record(func, args, kwargs)


def _write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an in-place operation; lazy inputs have no recipe afterwards."""
    written = _written(schema_of(func), args, kwargs)
    if not all(map(is_lazy, written)):  # a buffer
        return func(*pytree.tree_map_only(Tensor, materialize, args), **kwargs)
    for tensor in written:
        _forget(tensor)
    return func(*args, **kwargs)


def _record(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def compute(*tensors: Tensor) -> dict[str, Tensor]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        given, options = pytree.tree_unflatten(filled, spec)
        results = pytree.tree_leaves(func(*given, **options))
        return {str(number): _alone(result) for number, result in enumerate(results)}

    made = defer(compute, *(leaves[place] for place in places), by_rows=_is_by_rows(func, args))
    if func.is_view:
        for tensor in made.values():
            setattr(tensor, _VIEWED, leaves[0])
    if [str(each.type) for each in schema_of(func).returns] == ["Tensor"]:
        return made["0"]
    return list(made.values())


def _written(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The inputs that an operation writes into."""
    given = dict(zip((each.name for each in schema.arguments), args, strict=False)) | {**kwargs}
    marks = {argument.name: argument.alias_info for argument in schema.arguments}
    return [given[name] for name, mark in marks.items() if mark is not None and mark.is_write]


def _forget(tensor: Tensor) -> None:
    """Remove the recipes of a tensor that is written into, and of the tensors that it views.

    transformers does so when it initializes parameters that the checkpoint already has. Reading
    such a tensor afterwards is an error, since no recipe covers the write.
    """
    while is_lazy(tensor):
        forget_recipe(tensor)
        if not hasattr(tensor, _VIEWED):
            return
        tensor = getattr(tensor, _VIEWED)


def _alone(tensor: Tensor) -> Tensor:
    """The same values in memory of their own."""
    if is_lazy(tensor) or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone()


def _stack(tensors: list[Tensor]) -> Tensor:
    """`torch.stack` by rows, where a row is one tensor: experts are read one at a time."""
    mode = next(tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor))

    def rows(start: int, stop: int) -> Tensor:
        return torch.stack([materialize(tensor) for tensor in tensors[start:stop]])

    with mode:
        like = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype)
    return make_lazy(lambda: rows(0, len(tensors)), like, mode, rows)


def _is_by_rows(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether rows of the results depend only on the same rows of the inputs."""
    if func in (TO_COPY.default, _aten.clone.default, _aten.detach.default):
        return True
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    rank = tensors[0].dim()
    if func in (_aten.transpose.int, _aten.cat.default):
        _, *options = args
        dims = [dim % rank for dim in options if isinstance(dim, int)]
        return bool(dims) and 0 not in dims
    return False


def load_lazily(
    kind: Any, config: Any, stored: Mapping[str, LazyTensor]
) -> tuple[Any, Mapping[str, Any]]:
    """`kind.from_pretrained` on tensors that stay in their files.

    Args:
        kind: A transformers model class.
        config: The configuration of the model.
        stored: The tensors of the checkpoint by name.

    Returns:
        The model in evaluation mode, with lazy tensors for those of the checkpoint, and
        transformers' report (`output_loading_info`).

    Raises:
        Exception: transformers raises exceptions of many types.
    """
    mode = next((tensor.mode for tensor in stored.values()), FakeTensorMode())
    with load_in_one_thread(), _Recorder(mode):  # modes are local to a thread
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(stored),
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # mismatches are refused by name later
            trust_remote_code=False,
        )
    return model.requires_grad_(False), report
