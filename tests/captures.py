"""One `torch.export` for all models of one structure: most of the tests' time would be spent in it.

What is traced is a function of the structure of a model and of the shapes of its inputs, not of the
values of its weights. A `Memo` keeps what was traced of a structure, and gives it with the tensors
of the model that is captured now. Two models have one structure if everything that Python holds of
them is equal: classes, attributes, hooks, and how tensors are shared. Whatever cannot be compared
is traced anew, and so is all that the tests of tracing itself capture (the fixture `traced_anew`).
"""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
import sys
import types
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tests.switch import Switch

_NOT_READ = (
    *("_name_or_path", "name_or_path", "_model_name_or_path"),
    *("_weight_conversions", "_use_kernels"),
)
"""Attributes that say where a model is from; no forward pass reads them."""
_VERSION = "transformers_version"
_NOT_READ_IN_CONFIGURATIONS = (*_NOT_READ, _VERSION, "architectures", "dtype")
"""The same of objects that have a `transformers_version`. Layers have their weights' dtype."""
_LARGEST = 1 << 20
"""Elements of a tensor that is neither parameter nor buffer, and is compared by its values."""
_BY_IDENTITY = (types.BuiltinFunctionType, types.CodeType, types.ModuleType)
_OF_EVERY_CLASS = ("__dict__", "__doc__", "__module__", "__weakref__")
_INCOMPARABLE = (
    pickle.PicklingError,
    AttributeError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What pickling raises for objects that it does not take, or that hold themselves."""


class Memo(Switch):
    """Stands in for `torch.export.export`.

    Attributes:
        hits: How often a trace was used again.
    """

    def __init__(self, export: Callable[..., ExportedProgram]) -> None:
        self.hits = 0
        self._export = export
        self._traced: dict[bytes, ExportedProgram] = {}
        self._kept: dict[int, object] = {}

    def __call__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> ExportedProgram:
        """As `torch.export.export`."""
        key = self._key(model, args, kwargs, options) if self._on else None
        if key is not None and key in self._traced:
            self.hits += 1
            return _with_tensors(self._traced[key], model)
        exported = self._export(model, args, kwargs, **options)
        if key is not None:
            self._traced[key] = _without_tensors(exported)
        return exported

    def fresh(self) -> Memo:
        """One that has traced nothing yet."""
        return Memo(self._export)

    def _key(self, model: nn.Module, *call: Any) -> bytes | None:
        """A digest of what is traced, or None where a part of it cannot be compared."""
        if any(isinstance(getattr(m, "graph", None), fx.Graph) for m in model.modules()):
            return None
        written = io.BytesIO()
        forwards = [type(module).forward for module in model.modules()]  # a test may replace one
        state = (torch.get_default_dtype(), torch.is_grad_enabled(), forwards)
        try:
            _Structure(written, self._kept, model).dump((model, state))
            _Structure(written, self._kept).dump(call)
        except _INCOMPARABLE:
            return None
        return hashlib.sha256(written.getbuffer()).digest()


class _Structure(pickle.Pickler):
    """Writes all of an object but the values of weights; the bytes are compared and never read."""

    def __init__(
        self, file: io.BytesIO, kept: dict[int, object], model: nn.Module | None = None
    ) -> None:
        super().__init__(file, protocol=4)
        self.fast = True  # equal strings are written alike, whether or not they are one object
        self._kept = kept
        self._classes: dict[int, int] = {}
        self._valued = model is not None
        named = [] if model is None else [*model.named_parameters(), *model.named_buffers()]
        self._weights = {id(tensor): number for number, (_, tensor) in enumerate(named)}

    def persistent_id(self, obj: Any) -> object:
        """What is written in place of tensors, and of what is equal to itself alone."""
        if isinstance(obj, Tensor):
            return self._of_tensor(obj)
        if id(obj) in self._classes:
            return "class", self._classes[id(obj)]
        if isinstance(obj, _BY_IDENTITY) or _is_importable(obj):
            self._kept[id(obj)] = obj  # no later object gets its number
            return id(obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Models without what no forward pass reads; parts of classes and functions made anew."""
        if isinstance(obj, type):
            self._classes[id(obj)] = len(self._classes)
            members = {n: v for n, v in vars(obj).items() if n not in _OF_EVERY_CLASS}
            return tuple, ((obj.__name__, obj.__bases__, members),)
        if isinstance(obj, types.FunctionType):
            cells = tuple(cell.cell_contents for cell in obj.__closure__ or ())
            return tuple, ((obj.__code__, obj.__defaults__, obj.__kwdefaults__, cells, vars(obj)),)
        attributes = getattr(obj, "__dict__", {})
        if _VERSION in attributes:
            kept = sorted(attributes.keys() - {*_NOT_READ_IN_CONFIGURATIONS})
            return tuple, ((type(obj), {name: attributes[name] for name in kept}),)
        if any(name in attributes for name in _NOT_READ):
            state = {name: value for name, value in attributes.items() if name not in _NOT_READ}
            return tuple, ((type(obj), state),)
        return NotImplemented

    def _of_tensor(self, tensor: Tensor) -> object:
        number = self._weights.get(id(tensor))
        facts = (
            str(type(tensor)),
            str(tensor.dtype),
            str(tensor.device),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.requires_grad,
        )
        if number is not None or not self._valued:
            return number, facts
        if tensor.numel() > _LARGEST:
            raise ValueError("a large tensor")
        return facts, tensor.tolist()


def _is_importable(obj: Any) -> bool:
    """Whether an object is a class or function that its module has under its name."""
    if not isinstance(obj, (type, types.FunctionType)):
        return False
    found: Any = sys.modules.get(obj.__module__)
    for part in obj.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is obj


def _without_tensors(exported: ExportedProgram) -> Any:
    """The same trace, without the weights, which may be large."""
    kept: Any = copy.copy(exported)
    kept._graph_module = copy.deepcopy(exported.graph_module)  # what a user of the first one moves
    kept._state_dict = dict.fromkeys(exported.state_dict)
    return kept


def _with_tensors(kept: Any, model: nn.Module) -> ExportedProgram:
    """A trace with the tensors of a model."""
    own: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    again = copy.copy(kept)
    again._graph_module = copy.deepcopy(kept.graph_module)
    again._state_dict = {name: own[name] for name in kept._state_dict}
    again._constants = {
        name: own[name] if name in own else _attribute(model, name, value)
        for name, value in kept._constants.items()
    }
    return again


def _attribute(model: Any, name: str, value: Any) -> Any:
    """A tensor that the model holds as a plain attribute; one that tracing made is copied."""
    try:
        return attrgetter(name)(model)
    except AttributeError:
        return value.clone() if isinstance(value, Tensor) else value
