"""The call signature of a program: names, dtypes and shapes of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.errors import UserInputError
from qalora_compile.ir.meta import PAST
from qalora_compile.ir.torch_internals import CallTree, call_tree, pytree
from qalora_compile.untrusted import check_fields, quoted
from qalora_compile.untrusted.element_types import HALVES

Dim = int | str
Constant = bool | int | float | str | None
Call = Sequence[Any] | Mapping[str, Any]
"""The arguments of one call, by position or by name."""


@dataclass(frozen=True)
class InputLeaf:
    """One tensor (or constant) input.

    Attributes:
        name: Readable and unique, for example `input_ids` or `cache.0.1`.
        dtype: `float32`, `int64` …; None for a constant.
        shape: A fixed dimension is a number, a dynamic one a name (`batch`, `sequence` …).
        value: The value of a constant (`use_cache=False`), which calls must repeat.
    """

    name: str
    dtype: str | None
    shape: tuple[Dim, ...] = ()
    value: Constant = None


@dataclass(frozen=True)
class SizeRange:
    """Sizes of a dynamic axis for which the captured graph is valid; `high` None: no limit."""

    name: str
    low: int
    high: int | None

    def admits(self, size: int) -> bool:
        """Whether a size lies in the range."""
        return self.low <= size and (self.high is None or size <= self.high)

    def nearest(self, size: int) -> int:
        """The size in the range nearest to `size`."""
        return max(self.low, size if self.high is None else min(size, self.high))


@dataclass(frozen=True)
class Signature:
    """Inputs in flat order, names of the flat outputs, and limits of dynamic axes.

    `ranges` holds the axes on whose size the model branches. Outside the range the model takes
    another path than the graph, so calls there are refused.
    """

    inputs: tuple[InputLeaf, ...]
    outputs: tuple[str, ...]
    ranges: tuple[SizeRange, ...] = ()

    @property
    def cache(self) -> tuple[InputLeaf, ...]:
        """The inputs that hold past keys and values; none for a model without a cache."""
        return tuple(leaf for leaf in self.inputs if leaf.name.startswith(PAST))

    @property
    def own_cache(self) -> tuple[InputLeaf, ...]:
        """The part of `cache` for the decoder's own tokens, in an encoder-decoder model."""
        return tuple(leaf for leaf in self.cache if ".decoder." in leaf.name)

    @property
    def cross_cache(self) -> tuple[InputLeaf, ...]:
        """The part of `cache` for the encoder's outputs, in an encoder-decoder model."""
        return tuple(leaf for leaf in self.cache if ".encoder." in leaf.name)

    def check(self, leaves: Sequence[Any]) -> None:
        """Check the flat inputs of a call against the signature.

        Raises:
            UserInputError: a dtype, rank, fixed dimension or constant differs, or axes of one name
                differ in size or leave their range; the input is named.
        """
        sizes: dict[str, tuple[int, str]] = {}
        for leaf, value in zip(self.inputs, leaves, strict=True):
            if leaf.dtype is None:
                if value != leaf.value:
                    raise UserInputError(
                        f"input {leaf.name} is {value!r}, but was {leaf.value!r} at capture",
                        hint="constants are part of the graph: capture once for each value",
                    )
            else:
                _check_tensor(leaf, value)
                _check_sizes(leaf, value, sizes)
        for limit in self.ranges:
            if limit.name in sizes and not limit.admits(sizes[limit.name][0]):
                size, where = sizes[limit.name]
                most = "any size" if limit.high is None else str(limit.high)
                raise UserInputError(
                    f"the axis {limit.name} is {size} in {where}; the graph holds for {limit.low} "
                    f"to {most}",
                    hint="the model branches on this size: capture with an example in that range",
                )

    def widen(self, leaves: Sequence[Any]) -> list[Any]:
        """Flat inputs with half-precision tensors widened, exactly, where float32 is asked for.

        An exported half-precision model takes float32 inputs.
        """
        pairs = zip(self.inputs, leaves, strict=True)
        return [widened(value) if leaf.dtype == "float32" else value for leaf, value in pairs]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "inputs": [
                {"name": i.name, "dtype": i.dtype, "shape": list(i.shape), "value": i.value}
                for i in self.inputs
            ],
            "outputs": list(self.outputs),
            "ranges": [[r.name, r.low, r.high] for r in self.ranges],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Signature:
        """Undo `to_json`.

        Raises:
            ValueError, KeyError: the value is malformed.
        """
        inputs = tuple(InputLeaf(**check_fields(InputLeaf, i, "an input")) for i in value["inputs"])
        names = ("name", "low", "high")
        ranges = [dict(zip(names, row, strict=True)) for row in value.get("ranges", ())]
        outputs = value["outputs"]
        if not isinstance(outputs, list) or not all(isinstance(name, str) for name in outputs):
            raise ValueError(f"the outputs are {quoted(outputs)}")
        for leaf in inputs:
            known = leaf.dtype is None or isinstance(getattr(torch, leaf.dtype, 0), torch.dtype)
            if not known:
                raise ValueError(f"the input {quoted(leaf.name)} is of type {quoted(leaf.dtype)}")
        limits = tuple(SizeRange(**check_fields(SizeRange, row, "a range")) for row in ranges)
        return cls(inputs, tuple(outputs), limits)


def _check_tensor(leaf: InputLeaf, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise UserInputError(f"input {leaf.name} is {type(value).__name__}, not a tensor")
    if dtype_name(value.dtype) != leaf.dtype:
        raise UserInputError(
            f"input {leaf.name} is {dtype_name(value.dtype)}, but was {leaf.dtype} at capture"
        )
    shape = tuple(value.shape)
    fixed_ok = len(shape) == len(leaf.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(leaf.shape, shape, strict=True)
    )
    if not fixed_ok:
        raise UserInputError(
            f"input {leaf.name} has shape {list(shape)}, but the graph takes {list(leaf.shape)}",
            hint="numbers are fixed at capture: capture with an example whose other sizes are 2 or "
            "more, or name the dimension in dynamic_shapes",
        )


def _check_sizes(leaf: InputLeaf, value: Tensor, sizes: dict[str, tuple[int, str]]) -> None:
    """Check that axes of one name have one size."""
    for name, size in zip(leaf.shape, value.shape, strict=True):
        if isinstance(name, str):
            first, where = sizes.setdefault(name, (size, leaf.name))
            if first != size:
                raise UserInputError(
                    f"the axis {name} is {first} in {where} and {size} in {leaf.name}",
                    hint="give inputs of one size along axes of one name",
                )


def widened(value: Any) -> Any:
    """A half-precision tensor in float32, which is exact; anything else unchanged."""
    is_half = isinstance(value, Tensor) and dtype_name(value.dtype) in HALVES
    return value.float() if is_half else value


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` as `float32`."""
    return str(dtype).removeprefix("torch.")


def argument_names(graph: fx.Graph) -> list[str]:
    """Names of the arguments of the captured `forward`, positional ones first."""
    return list(_call_tree(graph).orig_args)


def input_spec(graph: fx.Graph) -> pytree.TreeSpec:
    """Tree of (args, kwargs)."""
    return _call_tree(graph).in_spec


def output_spec(graph: fx.Graph) -> pytree.TreeSpec:
    """Tree of the outputs."""
    spec = _call_tree(graph).out_spec
    assert spec is not None, "a captured graph always has an output tree"
    return spec


def _call_tree(graph: fx.Graph) -> CallTree:
    tree = call_tree(graph)
    assert tree is not None, "a captured graph has a call tree"
    return tree


def bind(graph: fx.Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments of a call in the order of the captured `forward`, by position or by name.

    Raises:
        UserInputError: an argument is missing, unknown or given twice.
    """
    names = argument_names(graph)
    if len(args) > len(names):
        raise UserInputError(f"{len(args)} arguments given, the graph takes {', '.join(names)}")
    values = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names or name in values:
            problem = "given twice" if name in values else "unknown"
            raise UserInputError(
                f"argument {name} is {problem}", hint=f"the graph takes: {', '.join(names)}"
            )
        values[name] = value
    missing = [name for name in names if name not in values]
    if missing:
        raise UserInputError(
            f"missing argument: {', '.join(missing)}", hint=f"the graph takes: {', '.join(names)}"
        )
    return [values[name] for name in names]


def split_call(call: Call) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """(args, kwargs) of a call: a sequence of arguments, or a mapping of named ones.

    Raises:
        UserInputError: the call is a tensor.
    """
    if isinstance(call, Tensor):
        raise UserInputError(
            "a call is a tensor, not the arguments of the model",
            hint="put the arguments of each call into a tuple: [(x,)], not [x]",
        )
    return ((), call) if isinstance(call, Mapping) else (tuple(call), {})


def flatten_inputs(graph: fx.Graph, values: Sequence[Any]) -> list[Any]:
    """Flat leaves of bound arguments, in placeholder order.

    Raises:
        UserInputError: the nesting differs from that of the capture.
    """
    spec = input_spec(graph)
    positional = spec.children()[0].num_children
    names = argument_names(graph)[positional:]
    tree = (tuple(values[:positional]), dict(zip(names, values[positional:], strict=True)))
    leaves, found = pytree.tree_flatten(tree)
    if found != spec:
        raise UserInputError(
            "the arguments are nested differently than at capture", hint=f"expected {spec}"
        )
    return leaves


def leaf_name(path: Sequence[Any], names: Sequence[str]) -> str:
    """Readable name of a leaf from its pytree path below (args, kwargs)."""
    (_, section), rest = (path[0], path[0].idx), path[1:]
    parts = [_key_text(key) for key in rest]
    if section == 0:
        parts[0] = names[int(parts[0])]
    return ".".join(parts)


def output_names(spec: pytree.TreeSpec) -> tuple[str, ...]:
    """Names of the flat outputs: keys where the tree has keys, else `output_0` and so on."""
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    names: list[str] = []
    for index, (path, _) in enumerate(paths):
        text = ".".join(_key_text(key) for key in path)
        if not text or text.replace(".", "").isdigit():
            text = "output" if spec.num_leaves == 1 else f"output_{index}"
        names.append(text)
    return tuple(names)


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
