"""One translation to ONNX for all programs of one graph, as `tests.captures` has one trace.

What torch.onnx makes of a program depends on its graph, on its inputs, and on the shapes of its
tensors, not on their values. A `Translations` keeps what was made of a graph, and gives a copy with
the tensors of the program that is translated now. Tests of translating itself do not use it (the
fixture `translated_anew`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

import qalora_compile as qc
from tests.switch import Switch

_SMALL = 64
"""Elements of a tensor that the translation may hold and the program does not."""
_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack")
"""What of a node's origin torch.onnx writes down."""


@dataclass(frozen=True)
class _Kept:
    """A translation, and which of its initializers are tensors of the program."""

    model: Any
    tensors: tuple[str, ...]


class Translations(Switch):
    """Stands in for `exporters.onnx.model.translate`.

    Attributes:
        hits: How often a translation was used again.
    """

    def __init__(self, translate: Callable[[qc.Program, qc.ExportSpec], Any]) -> None:
        self.hits = 0
        self._translate = translate
        self._kept: dict[Hashable, _Kept] = {}
        self._targets: dict[int, object] = {}

    def __call__(self, program: qc.Program, spec: qc.ExportSpec) -> Any:
        """As `translate`."""
        key = self._key(program, spec) if self._on else None
        if key is not None and key in self._kept:
            self.hits += 1
            return _with_tensors(self._kept[key], program.tensors())
        model = self._translate(program, spec)
        kept = None if key is None else _without_tensors(model, program.tensors())
        if key is not None and kept is not None:
            self._kept[key] = kept
        return model

    def _key(self, program: qc.Program, spec: qc.ExportSpec) -> Hashable | None:
        """All that a translation depends on; None where the graph has graphs in it."""
        tensors, nodes = program.tensors(), list(program.graph.nodes)
        for node in nodes:
            held = node.op in ("placeholder", "output", "call_function") or node.target in tensors
            if not held or isinstance(node.target, HigherOrderOperator):
                return None
        first: dict[int, str] = {}
        stored = tuple(
            (name, first.setdefault(id(tensor), name), type(tensor), *_facts(tensor))
            for name, tensor in tensors.items()
        )
        leaves, structure = pytree.tree_flatten(program.example)
        inputs = tuple(_facts(x) if isinstance(x, Tensor) else repr(x) for x in leaves)
        graph = tuple(map(self._of_node, nodes))
        signature = repr(program.signature.to_json())
        return repr(spec), signature, str(structure), inputs, stored, graph

    def _of_node(self, node: fx.Node) -> Hashable:
        if callable(node.target):
            self._targets[id(node.target)] = node.target  # no later function gets its number
        target = id(node.target) if callable(node.target) else node.target
        origin = tuple(str(node.meta.get(name)) for name in _ORIGINS)
        return node.op, node.name, target, repr(node.args), repr(node.kwargs), origin


def _facts(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad


def _without_tensors(model: Any, tensors: dict[str, Tensor]) -> _Kept | None:
    """A copy of a translation; None if it holds tensors that may have been computed."""
    named = []
    for name, value in model.graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        if name in tensors and isinstance(raw, Tensor):
            if (raw.shape, raw.dtype) != (tensors[name].shape, tensors[name].dtype):
                return None
            named.append(name)
        elif value.const_value.size > _SMALL:
            return None
    return _Kept(model.clone(), tuple(named))


def _with_tensors(kept: _Kept, tensors: dict[str, Tensor]) -> Any:
    """A copy of a translation with the tensors of a program."""
    model = kept.model.clone()
    for name in kept.tensors:
        value = model.graph.initializers[name]
        value.const_value = type(value.const_value)(tensors[name], name=value.const_value.name)
    return model
