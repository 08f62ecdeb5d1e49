"""widen-halves: compute a float16 or bfloat16 model in float32, on the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qalora_compile.errors import PostconditionError, UnsupportedError
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import Signature, dtype_name
from qalora_compile.ir.stages import ADAPTED, ANNOTATED, FLOAT, FOLDED, QUANTIZED
from qalora_compile.ir.torch_internals import pytree
from qalora_compile.passes.framework.base import Change, Pass, PassResult

_HALVES = (torch.float16, torch.bfloat16)
_HALF_NAMES = tuple(map(dtype_name, _HALVES))
_WIDE = torch.float32
_CAST = torch.ops.aten.to.dtype
_BITS = torch.ops.aten.view.dtype


@dataclass(frozen=True, kw_only=True)
class WidenHalves(Pass):
    """Read every half-precision tensor through a cast to float32, and drop casts to half.

    Before:  %x: bf16[batch, 64]
             %1 = aten.linear(%x, @fc.weight, @fc.bias)
             %2 = aten.to.dtype(%1, bf16)
    After:   %x: f32[batch, 64]
             %1 = aten.to.dtype(@fc.weight, f32)
             %2 = aten.to.dtype(@fc.bias, f32)
             %3 = aten.linear(%x, %1, %2)
             %4 = aten.to.dtype(%3, f32)

    ONNX Runtime's CPU provider has no bfloat16 arithmetic, and computes most of float16 through
    casts. The stored tensors stay half, so the file does not grow.

    Fires on: every read of a float16 or bfloat16 tensor, every argument that names such a dtype,
    every input of one: inputs and outputs become float32.
    Leaves alone: float32 and float64 values.
    Exactness: weights and inputs widen exactly; values between operators are no longer rounded to
    half precision.
    """

    name: ClassVar[str] = "widen-halves"
    consumes: ClassVar[tuple[str, ...]] = (FLOAT, ANNOTATED, QUANTIZED, ADAPTED, FOLDED)
    produces: ClassVar[str | None] = None

    def requires(self, program: Program) -> None:
        """Check that no node reinterprets the bits of a half-precision value.

        Raises:
            UnsupportedError: one does; its meaning would change.
        """
        for node in program.graph.nodes:
            if node.target is _BITS and _names_half(node):
                raise UnsupportedError(
                    "the model reinterprets the bits of a half-precision tensor",
                    where=f"node {node.name}",
                    hint="capture model.float() instead",
                )

    def call(self, program: Program) -> PassResult:
        """Widen."""
        graph, tensors = program.copy_graph(), program.tensors()
        changes = []
        for node in list(graph.nodes):
            if _names_half(node):
                node.args = pytree.tree_map(_widen_dtype, node.args)
                node.kwargs = pytree.tree_map(_widen_dtype, node.kwargs)
            _widen_record(node)
            stored = tensors.get(str(node.target)) if node.op == "get_attr" else None
            if stored is not None and stored.dtype in _HALVES:
                _cast(graph, node)
                changes.append(Change(str(node.target), f"{dtype_name(stored.dtype)} to float32"))
        halves = [site.name for site in program.plan if site.dtype in _HALF_NAMES]
        plan = program.plan.update({name: {"dtype": dtype_name(_WIDE)} for name in halves})
        after = program.evolve(graph=graph, plan=plan)
        after = dataclasses.replace(
            after,
            signature=_widen_signature(program.signature),
            example=pytree.tree_map(_widen_tensor, program.example),
        )
        return PassResult(after, tuple(changes))

    def ensures(self, before: Program, after: Program) -> None:
        """Only stored tensors, read through a cast, are left in half precision."""
        if needs_widening(after, stored=False):
            raise PostconditionError("an input or operator of half precision is left")


def needs_widening(program: Program, *, stored: bool = True) -> bool:
    """Whether a program has half-precision inputs, operators or, with `stored`, tensors."""
    return (
        any(leaf.dtype in _HALF_NAMES for leaf in program.signature.inputs)
        or any(map(_names_half, program.graph.nodes))
        or (stored and any(t.dtype in _HALVES for t in program.tensors().values()))
    )


def _arguments(node: fx.Node) -> Iterator[Any]:
    return iter(pytree.tree_leaves((node.args, node.kwargs)))


def _names_half(node: fx.Node) -> bool:
    return any(
        argument in _HALVES for argument in _arguments(node) if isinstance(argument, torch.dtype)
    )


def _widen_dtype(value: Any) -> Any:
    return _WIDE if isinstance(value, torch.dtype) and value in _HALVES else value


def _widen_tensor(value: Any) -> Any:
    return value.to(_WIDE) if isinstance(value, Tensor) and value.dtype in _HALVES else value


def _widen_record(node: fx.Node) -> None:
    """Update the value recorded at capture, from which later passes read shapes."""
    if node.op != "get_attr" and "val" in node.meta:
        node.meta["val"] = pytree.tree_map(_widen_tensor, node.meta["val"])


def _cast(graph: fx.Graph, node: fx.Node) -> None:
    """Put a cast between a stored tensor and its readers."""
    with graph.inserting_after(node):
        wide = graph.call_function(_CAST, (node, _WIDE))
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def _widen_signature(signature: Signature) -> Signature:
    leaves = tuple(
        dataclasses.replace(leaf, dtype=dtype_name(_WIDE)) if leaf.dtype in _HALF_NAMES else leaf
        for leaf in signature.inputs
    )
    return dataclasses.replace(signature, inputs=leaves)
