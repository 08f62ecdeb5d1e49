"""canonicalize-complex: rewrite complex numbers as pairs of real ones, as every target needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.errors import PostconditionError
from qalora_compile.ir.meta import module_path
from qalora_compile.ir.ops.views import argument, set_argument
from qalora_compile.ir.pattern import get_tensor
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import FLOAT
from qalora_compile.ir.torch_internals import TO_COPY
from qalora_compile.passes.framework.base import Change, Pass, PassResult

_ATEN = torch.ops.aten
_MAKE = (_ATEN.polar.default, _ATEN.complex.default, _ATEN.view_as_complex.default)
_READ = (_ATEN.view_as_real.default, _ATEN.real.default, _ATEN.imag.default)
_SAME = (
    *(_ATEN.clone.default, _ATEN.contiguous.default, _ATEN.detach.default, _ATEN.alias.default),
    *(_ATEN.detach_.default, _ATEN.lift_fresh_copy.default, _ATEN.index.Tensor),
)
"""Operators that act on a pair as on a number."""
_AXES: dict[Any, tuple[str, ...]] = {
    _ATEN.unsqueeze.default: ("dim",),
    _ATEN.squeeze.dim: ("dim",),
    _ATEN.slice.Tensor: ("dim",),
    _ATEN.select.int: ("dim",),
    _ATEN.index_select.default: ("dim",),
    _ATEN.transpose.int: ("dim0", "dim1"),
}
"""Names of the arguments that are axes."""
_SIZES = {_ATEN.view.default: "size", _ATEN.reshape.default: "shape", _ATEN.expand.default: "size"}
_PRODUCTS = (_ATEN.mul.Tensor, _ATEN.mul.Scalar)
_SUMS = (_ATEN.add.Tensor, _ATEN.sub.Tensor)


@dataclass(frozen=True, kw_only=True)
class CanonicalizeComplex(Pass):
    """Rewrite complex arithmetic on pairs `[..., 2]` of a real and an imaginary part.

    Before:  %1 = aten.view_as_complex(%x)
             %2 = aten.mul(%1, aten.polar(%r, %angle))
             %3 = aten.view_as_real(%2)
    After:   %1 = aten.mul(%r, aten.cos(%angle)), %2 = aten.mul(%r, aten.sin(%angle))
             %3 = aten.stack([x₀ %1 - x₁ %2, x₀ %2 + x₁ %1], -1)

    Fires on: graphs whose complex numbers are made, multiplied, added, indexed and reshaped, as
    rotary embeddings do (Llama 4, DeepSeek-V2, Meta's Llama).
    Leaves alone: every node of a graph that does anything else with them; no target takes it then.
    Exactness: the same products and sums as torch's complex kernels; those may fuse them.
    """

    name: ClassVar[str] = "canonicalize-complex"
    consumes: ClassVar[tuple[str, ...]] = (FLOAT,)
    produces: ClassVar[str | None] = None

    def call(self, program: Program) -> PassResult:
        """Rewrite."""
        if not _complex_nodes(program.graph, program):
            return PassResult(program.evolve())
        graph, tensors = program.copy_graph(), program.tensors()
        changes = _Rewrite(graph, tensors).run(_complex_nodes(graph, program) or set())
        return PassResult(program.evolve(graph=graph, tensors=tensors), changes)

    def ensures(self, before: Program, after: Program) -> None:
        """No complex number is left where all could be rewritten."""
        if _complex_nodes(after.graph, after):
            raise PostconditionError("a complex number is left", where="graph")


def _complex_nodes(graph: fx.Graph, program: Program) -> set[fx.Node] | None:
    """The nodes with complex values; None if an operator on them is not supported."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            tensor = get_tensor(program.module, str(node.target))
            if tensor is not None and tensor.is_complex():
                found.add(node)
        elif node.target in _MAKE:
            found.add(node)
        elif found.intersection(node.all_input_nodes) and node.target not in _READ:
            if not _is_known(node, found):
                return None
            found.add(node)
    return found


def _is_known(node: fx.Node, numbers: set[fx.Node]) -> bool:
    if node.target in _SUMS:  # all must be complex: a real summand is not a pair
        return not node.kwargs and numbers.issuperset(node.args)
    if node.target in _PRODUCTS:
        return not any(isinstance(factor, complex) for factor in node.args)
    known = (*_SAME, *_AXES, *_SIZES, _ATEN.permute.default)
    return node.target in known or _casts(node)


def _casts(node: fx.Node) -> bool:
    """Whether a node moves or casts a number to a device, or a complex type."""
    if getattr(node.target, "overloadpacket", None) not in (_ATEN.to, TO_COPY):
        return False
    types = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)]
    return all(dtype.is_complex for dtype in types)


class _Rewrite:
    """Rewrites one graph, complex value by complex value."""

    def __init__(self, graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
        self._graph, self._tensors = graph, tensors
        self._pairs: dict[Any, fx.Node] = {}

    def run(self, numbers: set[fx.Node]) -> tuple[Change, ...]:
        changed: dict[str, None] = {}
        gone = []
        for node in list(self._graph.nodes):
            with self._graph.inserting_before(node):
                if node in numbers:
                    self._pairs[node] = self._pair(node)
                elif node.target in _READ and argument(node, "self") in self._pairs:
                    node.replace_all_uses_with(self._read(node))
                else:
                    continue
            gone.append(node)
            changed[module_path(node) or node.name] = None
        for node in reversed(gone):
            self._graph.erase_node(node)
            if node.op == "get_attr":
                self._tensors.pop(str(node.target), None)
        return tuple(Change(path, "complex numbers to pairs") for path in changed)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._graph.call_function(target, args, kwargs)

    def _parts(self, number: Any) -> tuple[fx.Node, fx.Node]:
        """Real and imaginary part of a number."""
        real, imaginary = (
            self._call(_ATEN.select.int, self._pairs[number], -1, part) for part in (0, 1)
        )
        return real, imaginary

    def _stack(self, real: Any, imaginary: Any) -> fx.Node:
        return self._call(_ATEN.stack.default, [real, imaginary], -1)

    def _read(self, node: fx.Node) -> fx.Node:
        """The replacement for a reader of a number: the pair, or one part of it."""
        if node.target is _ATEN.view_as_real.default:
            return self._pairs[argument(node, "self")]
        real, imaginary = self._parts(argument(node, "self"))
        return real if node.target is _ATEN.real.default else imaginary

    def _pair(self, node: fx.Node) -> fx.Node:
        """The pair of a number."""
        if node.op == "get_attr":
            return self._constant(str(node.target))
        if node.target is _ATEN.view_as_complex.default:
            return self._call(_ATEN.alias.default, argument(node, "self"))
        if node.target is _ATEN.complex.default:
            return self._stack(*node.args)
        if node.target is _ATEN.polar.default:
            radius, angle = node.args
            cosine, sine = (self._call(f.default, angle) for f in (_ATEN.cos, _ATEN.sin))
            mul = _ATEN.mul.Tensor
            return self._stack(self._call(mul, radius, cosine), self._call(mul, radius, sine))
        if node.target in _PRODUCTS:
            return self._product(node)
        return self._moved(node)

    def _constant(self, name: str) -> fx.Node:
        pairs = f"{name}_pairs"
        self._tensors[pairs] = torch.view_as_real(self._tensors[name].detach()).contiguous()
        return self._graph.get_attr(pairs)

    def _product(self, node: fx.Node) -> fx.Node:
        a, b = argument(node, "self"), argument(node, "other")
        mul, add, sub = _ATEN.mul.Tensor, _ATEN.add.Tensor, _ATEN.sub.Tensor
        if a in self._pairs and b in self._pairs:
            (ar, ai), (br, bi) = self._parts(a), self._parts(b)
            real = self._call(sub, self._call(mul, ar, br), self._call(mul, ai, bi))
            imaginary = self._call(add, self._call(mul, ar, bi), self._call(mul, ai, br))
            return self._stack(real, imaginary)
        number, factor = (a, b) if a in self._pairs else (b, a)
        if isinstance(factor, fx.Node):
            factor = self._call(_ATEN.unsqueeze.default, factor, -1)
        return self._call(mul, self._pairs[number], factor)

    def _moved(self, node: fx.Node) -> fx.Node:
        """The same operation on pairs, whose last axis stays."""
        args: list[Any] = [
            self._pairs.get(a, a) if isinstance(a, fx.Node) else a for a in node.args
        ]
        kwargs = {key: _real(value) for key, value in node.kwargs.items()}
        moved = self._call(node.target, *map(_real, args), **kwargs)
        for name in _AXES.get(node.target, ()):
            axis = argument(node, name)
            if axis < 0:
                set_argument(moved, name, axis - 1)
        if node.target in _SIZES:
            name = _SIZES[node.target]
            set_argument(moved, name, [*argument(node, name), 2])
        elif node.target is _ATEN.permute.default:
            axes = argument(node, "dims")
            set_argument(moved, "dims", [*(axis % len(axes) for axis in axes), len(axes)])
        return moved


def _real(value: Any) -> Any:
    """The type of a part, for the type of a number."""
    return value.to_real() if isinstance(value, torch.dtype) and value.is_complex else value
