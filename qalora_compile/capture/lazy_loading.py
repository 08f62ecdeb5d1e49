"""transformers' own loader, run on tensors that stay in their files.

`from_pretrained` renames tensors, splits, stacks and transposes them by the conversion rules of the
architecture, casts them, ties and unties. It is given tensors without values here, and a mode that
writes down each operation on one as a recipe (`ir.deferred`): what it makes of the files is then
made of them when a layer is asked for, and no rule of transformers is repeated in this project.
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
"""What gives no tensor, and needs values."""
_VIEWED = "_qalora_viewed"
_MOST_MADE = 1 << 28
"""Bytes of parameters that transformers computes, tables of positions."""


Casts = Counter[tuple[torch.dtype, torch.dtype]]
"""How many tensors were cast, from which dtype to which."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint, as much of one as transformers' loader looks at.

    Args:
        name: In the checkpoint.
        like: Shape and dtype, without values.
        mode: What its fake tensors belong to.
        read: Reads it.
        read_rows: Reads some of its rows.
        casts: Counts the tensors that are asked for in another dtype, by both.
    """

    name: str
    like: Tensor
    mode: FakeTensorMode
    read: Callable[[], Tensor]
    read_rows: ReadRows
    casts: Casts

    def __getattr__(self, name: str) -> Any:
        """What is asked of it without its values: `dtype`, `shape`, `is_floating_point`."""
        return getattr(self.like, name)

    def __getitem__(self, index: Any) -> LazyTensor:
        """All of it; transformers asks for parts on several devices alone."""
        if index is not Ellipsis:
            raise UnsupportedError(f"transformers reads parts of {self.name}", where=self.name)
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """The deferred tensor, cast as it is read.

        Raises:
            UserInputError: it is of integers and the model's of floats, or the reverse.
        """
        wanted, own = dtype or self.like.dtype, self.like.dtype
        if wanted.is_floating_point != own.is_floating_point:
            raise UserInputError(
                f"{self.name} is {dtype_name(own)} in the files, and {dtype_name(wanted)} by "
                "config.json",
                where=self.name,
                hint="weights of integers have to be described by a quantization_config",
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
    """Writes down every operation on a deferred tensor as the recipe of its results."""

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
            # A parameter that the checkpoint lacks. Tables that are computed are made; a checkpoint
            # that lacks more is refused when `from_pretrained` is through, and takes no memory.
            self._made += like.nbytes
            if self._made > _MOST_MADE:
                with self._mode:
                    return torch.empty(like.shape, dtype=like.dtype)
        if not any(is_lazy(tensor) and not is_placeholder(tensor) for tensor in given):
            return func(*args, **kwargs)
        return _run(func, args, kwargs)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation gives for deferred tensors: deferred tensors."""
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
    """Run an operation that writes into its inputs; what was deferred has no recipe after it."""
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
    """Take the recipes from a tensor that is written into, and from those that it is a view of.

    transformers does so to starting values, for parameters that the checkpoint has already. Where
    such a tensor is asked for, that is an error: no recipe says what was written.
    """
    while is_lazy(tensor):
        forget_recipe(tensor)
        if not hasattr(tensor, _VIEWED):
            return
        tensor = getattr(tensor, _VIEWED)


def _alone(tensor: Tensor) -> Tensor:
    """The same values, in memory that holds nothing else."""
    if is_lazy(tensor) or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone()


def _stack(tensors: list[Tensor]) -> Tensor:
    """`torch.stack`, of which a row is one tensor: experts are read one after another."""
    mode = next(tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor))

    def rows(start: int, stop: int) -> Tensor:
        return torch.stack([materialize(tensor) for tensor in tensors[start:stop]])

    with mode:
        like = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype)
    return make_lazy(lambda: rows(0, len(tensors)), like, mode, rows)


def _is_by_rows(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether some rows of the inputs give those rows of the results."""
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
    """`kind.from_pretrained` of tensors that stay in their files.

    Args:
        kind: A class of models of transformers.
        config: Its configuration.
        stored: The tensors of the checkpoint by name.

    Returns:
        The model in evaluation mode, each tensor of it that comes of the checkpoint deferred, and
        transformers' report (`output_loading_info`).

    Raises:
        Exception: of many kinds, by transformers.
    """
    mode = next((tensor.mode for tensor in stored.values()), FakeTensorMode())
    with load_in_one_thread(), _Recorder(mode):  # a mode holds in one thread alone
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(stored),
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name
            trust_remote_code=False,
        )
    return model.requires_grad_(False), report
