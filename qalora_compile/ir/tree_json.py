"""The nesting of a program's arguments and results as JSON, without torch's own loader.

Torch writes a tree of containers as nested objects with a `type`, a `context` (a JSON text: the
keys of a dict, the fields of a dataclass) and `children_spec`. Its loader imports whatever module a
context names, so the text is parsed here: containers come from a fixed table, and contexts are
lists of keys.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections import OrderedDict
from typing import Any

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.ir.torch_internals import pytree

_PROTOCOL = 1
_SEQUENCES: dict[str, type] = {"builtins.tuple": tuple, "builtins.list": list}
_MAPPINGS: dict[str, type] = {"builtins.dict": dict, "collections.OrderedDict": OrderedDict}
_MODEL_OUTPUT = re.compile(
    r"(transformers\.modeling_outputs|transformers\.models\.(\w+)\.modeling_\2)\.(\w+)"
)
"""Classes in which models of transformers return their results; nothing else is imported."""


def tree_to_text(spec: pytree.TreeSpec) -> str:
    """Write a tree; `tree_from_text` undoes it.

    Raises:
        UnsupportedError: it holds a container that has no stored form.
    """
    try:
        text = pytree.treespec_dumps(spec)
        again = tree_from_text(text)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise _without_stored_form(spec, error) from error
    if again != spec:
        raise _without_stored_form(spec, "its keys are not texts or numbers")
    return text


def _without_stored_form(spec: pytree.TreeSpec, why: object) -> UnsupportedError:
    return UnsupportedError(
        f"the model takes or returns containers that have no stored form: {why}",
        where=str(spec),
        hint="take and return tensors in tuples, lists, dicts, transformers' output classes, or "
        "dataclasses registered with torch.export.register_dataclass",
    )


def tree_from_text(text: str) -> pytree.TreeSpec:
    """Read a tree that `tree_to_text` wrote. No class is looked up outside the fixed table.

    Raises:
        ValueError, TypeError, KeyError: the text is malformed.
        UserInputError: it names a class that is not a container of a stored program.
        UnsupportedError: it names an output class of transformers, which is not installed.
    """
    protocol, tree = json.loads(text)
    if protocol != _PROTOCOL:
        raise ValueError(f"the tree has version {protocol}, not {_PROTOCOL}")
    return _read(tree)


def _read(tree: dict[str, Any]) -> pytree.TreeSpec:
    kind, children = tree["type"], [_read(child) for child in tree["children_spec"]]
    context = None if tree["context"] is None else json.loads(tree["context"])
    if kind is None:
        if context is not None or children:
            raise ValueError("a leaf of a tree has no context and no children")
        return pytree.treespec_leaf()
    if kind in _SEQUENCES:
        if context is not None:
            raise ValueError(f"a {kind} has no context")
        return pytree.TreeSpec(_SEQUENCES[kind], None, children)
    if kind in _MAPPINGS:
        _check_keys(context, children)
        return pytree.TreeSpec(_MAPPINGS[kind], context, children)
    return _read_dataclass(str(kind), context, children)


def _check_keys(keys: Any, children: list[pytree.TreeSpec]) -> None:
    """Refuse a context that is not a list of distinct keys, one per child."""
    if not isinstance(keys, list) or not all(isinstance(key, (str, int)) for key in keys):
        raise ValueError(f"{keys!r} is not a list of keys")
    if len(keys) != len(children) or len(set(keys)) != len(keys):
        raise ValueError(f"there are {len(children)} values for the keys {keys!r}")


def _read_dataclass(name: str, context: Any, children: list[pytree.TreeSpec]) -> pytree.TreeSpec:
    """An output class of transformers, or a dataclass that the user's own code has registered."""
    output = _MODEL_OUTPUT.fullmatch(name)
    kind = _output_class(output[1], output[3]) if output else _registered(name)
    if output:
        _check_keys(context, children)
        names = context
    else:
        given, absent = context
        _check_keys(given, children)
        names = [*given, *absent]
    unknown = {*map(str, names)} - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"{name} has no field {sorted(unknown)[0]!r}")
    return pytree.TreeSpec(kind, context, children)


def _output_class(module: str, name: str) -> Any:
    try:
        from transformers.utils import ModelOutput

        kind = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UnsupportedError(
            f"the program returns a {module}.{name}, which cannot be imported: {error}",
            hint="pip install 'qalora-compile[hf]'",
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, ModelOutput)) or kind is ModelOutput:
        raise UserInputError(f"{module}.{name} is not an output class of transformers")
    return kind


def _registered(name: str) -> Any:
    """A dataclass that was registered under this name in this process.

    Raises:
        UserInputError: there is none.
    """
    kind = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise UserInputError(
            f"the program takes or returns a {name}, which is not registered",
            hint="import the module that calls register_dataclass for it before loading",
        )
    return kind
