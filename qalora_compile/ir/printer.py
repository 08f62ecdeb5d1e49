"""A stable text form of a program, for people and golden tests.

Values are numbered in graph order, so the text does not depend on torch's names of nodes. Tensors
are written `@name`, and the node that computes a site's output names the site.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qalora_compile.ir.meta import site_of
from qalora_compile.ir.ops.views import output_value
from qalora_compile.ir.program_parts import ProgramParts
from qalora_compile.ir.signature import dtype_name
from qalora_compile.ir.torch_internals import OpOverload
from qalora_compile.untrusted.element_types import PROGRAM_TYPES

_SHORT = {kind.name: kind.short for kind in PROGRAM_TYPES if kind.short}


def print_program(program: ProgramParts) -> str:
    """The program as text: inputs, nodes, outputs, then the tensors that the nodes read."""
    counts = ", ".join(f"{n} {d}" for d, n in sorted(program.plan.counts().items()))
    lines = [f"program {program.stage}" + (f" ({counts})" if counts else "")]
    for leaf in program.signature.inputs:
        kind = (
            f"{_short(leaf.dtype)}[{', '.join(map(str, leaf.shape))}]"
            if leaf.dtype
            else f"constant {leaf.value!r}"
        )
        lines.append(f"  input %{leaf.name}: {kind}")
    names: dict[fx.Node, str] = {}
    inputs = iter(program.signature.inputs)
    number = 0
    for node in program.graph.nodes:
        if node.op == "placeholder":
            names[node] = f"%{next(inputs).name}"
        elif node.op == "get_attr":
            names[node] = f"@{node.target}"
        elif node.op == "output":
            lines.append(f"  return {_text(output_value(program.graph), names)}")
        else:
            names[node] = f"%{number}"
            number += 1
            lines.append(_line(node, names))
    lines.append("tensors")
    for name, tensor in sorted(program.tensors().items()):
        lines.append(f"  @{name}: {_tensor_text(tensor)}")
    return "\n".join(lines) + "\n"


def _line(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    arguments = [_text(a, names) for a in node.args]
    arguments += [f"{k}={_text(v, names)}" for k, v in sorted(node.kwargs.items())]
    line = f"  {names[node]} = {_target_text(node)}({', '.join(arguments)})"
    site = site_of(node)
    return f"{line}  # {site}" if site else line


def _target_text(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _text(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_text(v, names) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, torch.dtype):
        return _short(dtype_name(value))
    if isinstance(value, float):
        return f"{value:.9g}"
    return str(value)


def _tensor_text(tensor: Tensor) -> str:
    trainable = " trainable" if tensor.requires_grad else ""
    return f"{_short(dtype_name(tensor.dtype))}{list(tensor.shape)}{trainable}"


def _short(dtype: str | None) -> str:
    return _SHORT.get(dtype or "", dtype or "")
