"""`translate`: turn a legalized program into an ONNX model in memory, by torch.onnx."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import torch
from torch.export import ExportedProgram

from qalora_compile.config import ExportSpec
from qalora_compile.errors import InternalError, UnsupportedError
from qalora_compile.exporters.onnx.exported import lift, retrace
from qalora_compile.exporters.onnx.translate import translation_table
from qalora_compile.ir.ops.views import output_value
from qalora_compile.ir.program import Program
from qalora_compile.ir.torch_internals import pytree, quick_type_promotion
from qalora_compile.optional import quiet_logger, require

_OPERATOR = re.compile(r"(?:target=torch\.ops\.|OpOverload\(op=')([\w.]+)")


def translate(program: Program, spec: ExportSpec) -> Any:
    """Translate the graph with torch.onnx, without its optimizer.

    The graph is translated unchanged if possible. If an operator has no direct translation, torch
    traces and decomposes the graph first.

    Raises:
        UnsupportedError: torch.onnx cannot translate an operator, even decomposed.
    """
    for package in ("onnx", "onnxscript", "onnx_ir"):
        require(package, extra="onnx", purpose="export to ONNX")
    training = program.module.training
    program.eval()
    try:
        lifted = lift(program)
        if lifted is not None:
            with suppress(torch.onnx.OnnxExporterError):
                return _to_onnx(lifted, program, spec)
        return _to_onnx(retrace(program), program, spec)
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedError(
            f"torch.onnx cannot translate the program: {_cause(error)}",
            hint="replace the operator in the model by others that ONNX has, or report it",
        ) from error
    finally:
        program.module.train(training)


def _to_onnx(exported: ExportedProgram, program: Program, spec: ExportSpec) -> Any:
    bias = spec.release is None or spec.release.bias
    with _quiet(), quick_type_promotion():
        onnx_program = torch.onnx.export(
            exported,
            (),
            kwargs=None,
            dynamo=True,
            # The time of the optimizer's rewrite rules is more than linear in the number of layers.
            optimize=False,
            opset_version=spec.onnx_opset,
            input_names=[leaf.name for leaf in program.signature.inputs if leaf.dtype],
            output_names=tensor_outputs(program),
            custom_translation_table=translation_table(spec, bias=bias),
            verbose=False,
        )
    if onnx_program is None:
        raise InternalError("torch.onnx.export returned nothing")
    return onnx_program.model


def tensor_outputs(program: Program) -> list[str]:
    """Names of the outputs that are tensors; an output that is None is left out in ONNX."""
    values = pytree.tree_leaves(output_value(program.graph), is_leaf=lambda leaf: leaf is None)
    return [
        name
        for name, value in zip(program.signature.outputs, values, strict=True)
        if isinstance(value, torch.fx.Node)
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.onnx's progress lines and its notes on missing torchvision off the terminal."""
    with quiet_logger("torch.onnx"), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _cause(error: BaseException) -> str:
    """The operator that failed and the reason, from the first of a chain of exceptions."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(map(str, chain))
    found = _OPERATOR.search(text)
    lines = [line for line in str(chain[-1]).splitlines() if line.strip()]
    reason = lines[0] if lines else type(chain[-1]).__name__
    return f"{found.group(1)}: {reason}" if found else reason
