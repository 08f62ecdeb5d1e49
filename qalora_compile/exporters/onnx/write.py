"""`write_onnx`: from a legalized program to a checked `.onnx` file."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from qalora_compile.config import ExportSpec
from qalora_compile.errors import InternalError, UnsupportedError
from qalora_compile.exporters.base import EXACT, Capability, ExportReport, rounds
from qalora_compile.exporters.onnx.functions import (
    MICROSOFT,
    QALORA,
    layered_functions,
)
from qalora_compile.exporters.onnx.initializers import defer_initializers, write_model
from qalora_compile.exporters.onnx.tidy import name_axes, name_sites, tidy
from qalora_compile.exporters.onnx.translate import translation_table
from qalora_compile.files import atomic_files
from qalora_compile.ir.meta import ONNX_METADATA_KEY, QDQ_ACCURACY_KEY
from qalora_compile.ir.module import erase_unread
from qalora_compile.ir.plan import Site
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import argument_names, input_spec
from qalora_compile.optional import require

_OPERATOR = re.compile(r"(?:target=torch\.ops\.|OpOverload\(op=')([\w.]+)")

_ASSERTIONS = ("aten._assert_scalar.default", "aten._assert_async.msg", "aten._assert_async.default")

def write_onnx(program: Program, path: Path, spec: ExportSpec) -> ExportReport:
    """Translate, tidy, name, check and write.

    Args:
        program: Legalized for the target, or a float program (see `api.lower`).
        path: The `.onnx` file.
        spec: Options; its target names the stage that `program` must have.

    Raises:
        UnsupportedError: torch.onnx has no translation for an operator, or the checker refuses.
    """
    for package in ("onnx", "onnxscript", "onnx_ir"):
        require(package, extra="onnx", purpose="export to ONNX")
    model = _translate(program, spec)
    defer_initializers(model, program)
    tidy(model)
    name_axes(model, program.signature)
    sites = name_sites(model, program)
    _add_functions(model)
    model.producer_name = "qalora-compile"
    model.metadata_props[ONNX_METADATA_KEY] = _metadata(program, spec, sites)
    return _save(model, program, path, spec)


def _translate(program: Program, spec: ExportSpec) -> Any:
    """Re-trace the rewritten graph and let torch.onnx translate it, without its optimizer."""
    training = program.module.training
    program.eval()
    try:
        exported = _retrace(program)
        with _quiet():
            onnx_program = torch.onnx.export(
                exported,
                (),
                kwargs=None,
                dynamo=True,
                # The optimizer's rewrite rules take time more than linear in the layers.
                optimize=False,
                opset_version=spec.onnx_opset,
                input_names=[leaf.name for leaf in program.signature.inputs if leaf.dtype],
                output_names=_tensor_outputs(program),
                custom_translation_table=translation_table(spec.onnx_opset),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedError(
            f"torch.onnx cannot translate the program: {_cause(error)}",
            hint="replace the operator in the model by others that ONNX has, or report it",
        ) from error
    finally:
        program.module.train(training)
    if onnx_program is None:
        raise InternalError("torch.onnx.export returned nothing")
    return onnx_program.model


def _add_functions(model: Any) -> None:
    """Say what GroupQuantLinear means to a runtime that has no kernel for it, if it is there."""
    ir = require("onnx_ir", extra="onnx", purpose="write an ONNX model")
    if QALORA not in model.opset_imports:
        return
    for proto in layered_functions(model.opset_imports[""]):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    model.opset_imports[MICROSOFT] = 1


def _retrace(program: Program) -> ExportedProgram:
    """Export the rewritten GraphModule, with the dimensions dynamic that capture kept dynamic."""
    args, kwargs = program.example
    shapes: list[Any] = [
        {a: Dim.AUTO for a, size in enumerate(leaf.shape) if isinstance(size, str)} or None
        for leaf in program.signature.inputs
    ]
    names = argument_names(program.graph)
    spec = input_spec(program.graph)
    shape_args, shape_kwargs = pytree.tree_unflatten(shapes, spec)
    dynamic = dict(zip(names, [*shape_args, *shape_kwargs.values()], strict=True))
    module = _without_assertions(program)
    return torch.export.export(module, args, dict(kwargs), dynamic_shapes=dynamic, strict=False)


def _tensor_outputs(program: Program) -> list[str]:
    """Names of the outputs that are tensors: a None among them is no output of an ONNX model."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    values = pytree.tree_leaves(output.args[0], is_leaf=lambda leaf: leaf is None)
    return [
        name
        for name, value in zip(program.signature.outputs, values, strict=True)
        if isinstance(value, torch.fx.Node)
    ]


def _without_assertions(program: Program) -> torch.nn.Module:
    """The graph without the model's own run-time assertions, for which ONNX has no operator."""
    graph = program.copy_graph()
    checks = [n for n in graph.nodes if str(n.target) in _ASSERTIONS]
    if not checks:
        return program.module
    erase_unread(checks)
    return program.module.rebuild(graph, program.tensors())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.onnx's progress lines and its notes on missing torchvision off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _metadata(program: Program, spec: ExportSpec, sites: dict[str, str]) -> str:
    from qalora_compile import __version__

    tensors = program.tensors()
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    names = ("qweight", "scale", "zero_point", "correction")
    layers = [
        {
            "site": s.name,
            "kind": s.kind,
            "weight": s.weight,
            "decision": s.decision,
            "reason": s.reason,
            "why_bits": s.why_bits,
            "bits": s.bits,
            "group_size": s.group_size,
            "k": s.k,
            "n": s.n,
            "experts": s.experts,
            "shape": list(tensors[s.weight].shape) if s.weight in tensors else None,
            "bytes": sum(
                sizes.get(name, 0)
                for name in ([s.weight] if s.bits is None else _parts(s, names))
            ),
        }
        for s in program.plan
    ]
    value = {
        "version": __version__,
        "target": spec.target,
        "stage": program.stage,
        "history": list(program.history),
        "signature": program.signature.to_json(),
        "layers": layers,
        "site_values": sites,
    }
    return json.dumps(value, sort_keys=True)


def _parts(site: Site, names: tuple[str, ...]) -> list[str]:
    """Names of the lowered tensors of a site."""
    lead = [f"{site.path}.{expert}" for expert in range(site.experts)] if site.experts else []
    return [f"{path}.{name}" for path in lead or [site.path] for name in names]


def _save(model: Any, program: Program, path: Path, spec: ExportSpec) -> ExportReport:
    onnx = require("onnx", extra="onnx", purpose="check an ONNX model")
    with atomic_files(path, overwrite=spec.overwrite) as scratch:
        write_model(model, scratch)
        try:
            onnx.checker.check_model(str(scratch))
        except onnx.checker.ValidationError as error:
            raise InternalError(f"the ONNX checker refuses the model: {error}") from error
        sizes = {f.name: f.stat().st_size for f in scratch.parent.iterdir()}
    nodes = list(model.graph.all_nodes())
    return ExportReport(
        path=path,
        files=sizes,
        target=spec.target,
        nodes=len(nodes),
        quantized_layers=sum(map(_is_layer, nodes)),
        capabilities=_capabilities(program, spec),
    )


def _is_layer(node: Any) -> bool:
    """Whether a node is a quantized layer, or dequantizes its weight."""
    if (node.domain, node.op_type) in ((MICROSOFT, "MatMulNBits"), (QALORA, "GroupQuantLinear")):
        return True
    return node.op_type == "DequantizeLinear" and "block_size" in node.attributes


def _capabilities(program: Program, spec: ExportSpec) -> dict[str, Capability]:
    widened = any(step.startswith("widen-halves") for step in program.history)
    exact = Capability("exact", "half-precision model computed in float32") if widened else EXACT
    parameter = EXACT if spec.parameter_dtype == "float32" else rounds(spec.parameter_dtype)
    zero_point = Capability("exact", "integer part and float32 correction")
    if spec.target == "ort":
        zero_point = parameter
    elif spec.correction == "digits":
        zero_point = rounds("integer part and correction in digits")
    activations = exact if spec.accuracy_level == 0 else rounds("int8")
    if spec.target == "onnx":
        activations = Capability("exact", f"in ONNX Runtime with {QDQ_ACCURACY_KEY}=0")
    return {
        "codes": EXACT,
        "scale": parameter,
        "zero_point": zero_point,
        "float tensors": EXACT,
        "activations": activations,
    }


def _cause(error: BaseException) -> str:
    """The operator that failed and why, from the first of a chain of exceptions."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(map(str, chain))
    found = _OPERATOR.search(text)
    lines = [line for line in str(chain[-1]).splitlines() if line.strip()]
    reason = lines[0] if lines else type(chain[-1]).__name__
    return f"{found.group(1)}: {reason}" if found else reason
