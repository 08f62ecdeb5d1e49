"""`convert`: a legalized program as a model of Core ML, by coremltools' frontend for torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram

from qalora_compile.errors import QaloraError, UnsupportedError
from qalora_compile.exporters.coreml.package import number_values
from qalora_compile.exporters.coreml.weights import Weights, legal_name, register
from qalora_compile.exporters.onnx.exported import retrace
from qalora_compile.exporters.onnx.model import tensor_outputs
from qalora_compile.exporters.traced import down_to_site, pad_groups, pooled_adapter
from qalora_compile.ir.affine import sum_groups
from qalora_compile.ir.coreml_package import coremltools, main_block, quiet
from qalora_compile.ir.meta import site_of
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import (
    BLOCK_EMBEDDING,
    GROUP_QUANT_LINEAR,
    GROUP_SUM,
    PAD_GROUPS,
    POOLED_ADAPTER,
)
from qalora_compile.ir.torch_internals import OpOverload

_OWN: dict[OpOverload, Any] = {
    GROUP_SUM: sum_groups,
    PAD_GROUPS: pad_groups,
    POOLED_ADAPTER: pooled_adapter,
}
"""Operators of this package that ATen has the parts of."""
_ON_CODES = {GROUP_QUANT_LINEAR: "emit_linear", BLOCK_EMBEDDING: "emit_embedding"}
_EMITTED = {**_ON_CODES, torch.ops.aten.alias.default: "emit_alias"}
"""Operators that coremltools has no rule for → methods of `Weights`."""
_REFUSED = re.compile(r"(?:function for op '|, kind )([^'\s]+)")


class Converted(NamedTuple):
    """A converted graph.

    Attributes:
        model: The specification; its inputs and outputs are in the order of the program's
            signature.
        weights: The weights of the quantized layers.
        sites: Site name → name of the value that is its output, where the model has that value.
    """

    model: Any
    weights: Weights
    sites: dict[str, str]


def convert(program: Program, package: Path) -> Converted:
    """Convert the graph, and write coremltools' package.

    Args:
        program: Lowered for target `coreml`, or a float program, with its tensors in memory.
        package: The folder to write, whose name ends in `.mlpackage`.

    Raises:
        UnsupportedError: coremltools cannot convert the graph; an operator that it has no rule for
            is named.
    """
    tools = coremltools()
    with program.evaluating(), quiet():
        exported = retrace(program)
        weights = Weights()
        register(weights, {_name_of(op): method for op, method in _EMITTED.items()})
        exported = exported.run_decompositions(_decompositions())
        weights.names = exported.graph_signature.inputs_to_buffers
        _allow_one(exported)
        try:
            model = tools.convert(
                exported,
                outputs=[tools.TensorType(name=legal_name(n)) for n in tensor_outputs(program)],
                minimum_deployment_target=tools.target.iOS18,
                compute_precision=tools.precision.FLOAT32,
                skip_model_load=True,
                package_dir=str(package),
            )
        except QaloraError:
            raise
        except Exception as error:  # of the frontend, or of any of its passes: many types
            raise UnsupportedError(
                f"coremltools cannot convert {_what(error)}",
                hint="target ort or onnx may hold the model; or replace the operator in the model",
            ) from error
    spec = model.get_spec()
    made = {one.name for op in main_block(spec).operations for one in op.outputs}
    sites = {site: name for site, name in _sites(program, exported) if name in made}
    signature = exported.graph_signature
    tensors = (*signature.inputs_to_parameters, *signature.inputs_to_buffers)
    names = number_values(spec, {*weights.made.values(), *tensors})
    return Converted(spec, weights, {site: names.get(name, name) for site, name in sites.items()})


def _sites(program: Program, exported: ExportedProgram) -> Iterator[tuple[str, str]]:
    """Site name and name of its output; layers are in the order of the lowered program."""
    old, new = (
        [node for node in graph.nodes if node.target in _ON_CODES]
        for graph in (program.graph, exported.graph)
    )
    for before, after in zip(old, new, strict=True):
        marked, node = down_to_site(before, after)
        site = site_of(marked)
        if site is not None and marked.target == node.target:
            yield site, node.name


def _allow_one(exported: ExportedProgram) -> None:
    """Let every axis of a variable size be 1 long.

    torch.export gives such an axis a least size of 2, which says only that it was not traced for
    size 1; coremltools makes a limit of it, which refuses a batch of one.
    """
    ranges = exported.range_constraints
    for symbol, found in list(ranges.items()):
        ranges[symbol] = type(found)(1, found.upper)


def _name_of(operator: OpOverload) -> str:
    """The name under which coremltools looks an operator up."""
    return str(operator.name()).removesuffix(".default").removeprefix("aten::")


def without_bfloat16(program: Program) -> Program:
    """The program with its bfloat16 tensors in float32, which is exact: Core ML has no bfloat16."""
    tensors = program.tensors()
    wide = {name: t.float() for name, t in tensors.items() if t.dtype == torch.bfloat16}
    if not wide:
        return program
    module = program.module.rebuild(program.copy_graph(), tensors | wide)
    return dataclasses.replace(program, module=module)


def _decompositions() -> dict[OpOverload, Any]:
    """Torch's decompositions of operators that coremltools has no rule for, and ours."""
    table: Any = torch.export.default_decompositions()
    names = coremltools("converters.mil.frontend.torch.torch_op_registry")
    # the registry's own name is private, but not its class
    (rules,) = (one for one in vars(names).values() if isinstance(one, names.TorchOpsRegistry))
    return {op: made for op, made in table.items() if rules.get_func(str(op)) is None} | _OWN


def _what(error: Exception) -> str:
    """The operator that a message names, or the message's first line."""
    text = str(error).strip()
    found = _REFUSED.search(text)
    first = (text.splitlines() or [""])[0]
    return found.group(1) if found else f"the model: {type(error).__name__}: {first[:200]}"
