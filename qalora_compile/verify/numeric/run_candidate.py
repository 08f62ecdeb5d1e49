"""The values of a candidate in one execution mode, for a comparison along the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import widened
from qalora_compile.verify.numeric.run_float64 import run_nodes
from qalora_compile.verify.proof.graphs.graph import Graph, Ref
from qalora_compile.verify.runners.onnx_session import OnnxSession
from qalora_compile.verify.runners.openvino_session import OpenvinoSession

Compute = Callable[[Program, Sequence[Any]], dict[str, Tensor]]
"""Values of the candidate by name, for the flat inputs of the reference."""


def run_program(program: Program, names: Sequence[str]) -> Compute:
    """The nodes of a program."""

    def compute(source: Program, leaves: Sequence[Any]) -> dict[str, Tensor]:
        return run_nodes(program, program.signature.widen(leaves), frozenset(names))

    return compute


def run_model(session: OnnxSession, graph: Graph, names: Sequence[str]) -> Compute:
    """Outputs come from the file as it is, inner values from a session with them as outputs."""
    outputs = {out.name for out in session.session.get_outputs()}
    inner = [name for name in names if name not in outputs and name not in graph.inputs]

    def compute(source: Program, leaves: Sequence[Any]) -> dict[str, Tensor]:
        feed = {
            leaf.name: value.detach()
            for leaf, value in zip(source.signature.inputs, leaves, strict=True)
            if isinstance(value, Tensor)
        }
        wide = {name: widened(value) for name, value in feed.items()}
        arrays = {name: value.numpy() for name, value in wide.items()}
        found = session.outputs(arrays) | {n: v for n, v in wide.items() if n in graph.inputs}
        return found | (session.values(inner, arrays) if inner else {})

    return compute


def run_openvino(session: OpenvinoSession, graph: Graph, names: Sequence[str]) -> Compute:
    """As `run_model`: outputs come from the file as it is."""
    outputs = {value.name: name for name, value in graph.outputs.items() if isinstance(value, Ref)}
    inner = [name for name in names if name not in outputs and name not in graph.inputs]

    def compute(source: Program, leaves: Sequence[Any]) -> dict[str, Tensor]:
        pairs = zip(source.signature.inputs, leaves, strict=True)
        wide = {leaf.name: widened(v.detach()) for leaf, v in pairs if isinstance(v, Tensor)}
        arrays = {name: value.numpy() for name, value in wide.items()}
        found = session.outputs(arrays)
        named = {value: found[name] for value, name in outputs.items()}
        named |= {n: v for n, v in wide.items() if n in graph.inputs}
        return named | (session.values(inner, arrays) if inner else {})

    return compute
