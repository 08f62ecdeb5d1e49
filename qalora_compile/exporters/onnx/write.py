"""`write_onnx`: turn a legalized program into a checked `.onnx` file."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from qalora_compile._version import __version__
from qalora_compile.config import NBITS, ExportSpec
from qalora_compile.errors import InternalError
from qalora_compile.exporters.capability import EXACT, Capability, ExportReport, rounds
from qalora_compile.exporters.onnx.attention_function import CACHED_ATTENTION, attention_function
from qalora_compile.exporters.onnx.functions import (
    MICROSOFT,
    QALORA,
    FunctionForm,
    layered_functions,
)
from qalora_compile.exporters.onnx.initializers import defer_initializers, write_model
from qalora_compile.exporters.onnx.model import translate
from qalora_compile.exporters.onnx.one_file import fits_in_one_file, join_weights
from qalora_compile.exporters.onnx.ort_format import check_ort_format, convert_to_ort
from qalora_compile.exporters.onnx.shared_cache import share_cache
from qalora_compile.exporters.onnx.tidy import name_axes, name_sites, tidy
from qalora_compile.files import atomic_files
from qalora_compile.files.marks import PRODUCER
from qalora_compile.ir.joined_layers import joined_layers
from qalora_compile.ir.meta import ONNX_METADATA_KEY, QDQ_ACCURACY_KEY
from qalora_compile.ir.onnx_metadata import OF_SITES, OnnxLayer, OnnxMetadata
from qalora_compile.ir.program import Program
from qalora_compile.ir.site_plan import Site
from qalora_compile.ir.stages import HIGH_CODES, PLANE_NAMES
from qalora_compile.optional import require
from qalora_compile.untrusted.artifacts import data_file

SUFFIXES = {"onnx": ".onnx", "ort": ".ort"}
"""The suffix of a file in each of `config.FORMATS`."""
_ACTIVATIONS = {0: EXACT, 2: rounds("int16"), 4: rounds("int8")}
"""What each accuracy level does to activations."""


def write_onnx(
    program: Program, path: Path, spec: ExportSpec, *, resume: str | None = None
) -> ExportReport:
    """Translate, tidy, name, check and write.

    Args:
        program: Legalized for the target, or a float program (see `api.lower`).
        path: The `.onnx` file, or the `.ort` file if the format is `ort`.
        spec: Options; the target determines the stage that `program` must have.
        resume: A key of everything that determines the model; an interrupted run with the same
            key is continued (see `files`).

    Raises:
        UnsupportedError: torch.onnx has no translation for an operator; or see `check_ort_format`.
    """
    if spec.format == "ort":
        check_ort_format(program, spec)
    return write_translated(translate(program, spec), program, path, spec, resume)


def write_translated(
    model: Any, program: Program, path: Path, spec: ExportSpec, resume: str | None = None
) -> ExportReport:
    """Tidy, name, check and write a model that torch.onnx has translated."""
    defer_initializers(model, program)
    share_cache(model)
    tidy(model)
    name_axes(model, program.signature)
    sites = name_sites(model, program)
    _add_functions(model, spec.expansion)
    model.producer_name, model.producer_version = PRODUCER, __version__
    model.metadata_props[ONNX_METADATA_KEY] = metadata_text(program, spec, sites)
    return _save(model, program, path, spec, resume)


def _add_functions(model: Any, expansion: str) -> None:
    """Define the operators of the library for runtimes that have no kernel for them."""
    ir = require("onnx_ir", extra="onnx", purpose="write an ONNX model")
    opset, ours = model.opset_imports[""], defaultdict[str, list[Any]](list)
    for node in model.graph.all_nodes():
        if node.domain == QALORA:
            ours[node.op_type].append(node)
    protos = []
    if layers := ours.get("GroupQuantLinear"):
        protos += layered_functions(opset, _function_form(ir, layers, expansion))
        if expansion == NBITS:
            model.opset_imports[MICROSOFT] = 1
    if CACHED_ATTENTION in ours:
        protos.append(attention_function(opset))
    for proto in protos:
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function


def _function_form(ir: Any, layers: list[Any], expansion: str) -> FunctionForm:
    """What the function has to do for these nodes."""
    stated = [{name: a.value for name, a in node.attributes.items()} for node in layers]
    types = [[value.dtype for value in node.inputs] for node in layers]
    single = ir.DataType.FLOAT
    return FunctionForm(
        half_parameters=any(scale != single for _, _, scale, _ in types),
        half_inputs=any(x != single for x, *_ in types),
        blocks=any(each["group_size"] != each["stock_block_size"] for each in stated),
        widen=any(each["bits"] != each["stock_bits"] for each in stated),
        expansion=expansion,
    )


def metadata_text(program: Program, spec: ExportSpec, sites: dict[str, str]) -> str:
    """The metadata of an exported graph, see `OnnxMetadata`; `sites` as its `site_values`."""
    from qalora_compile._version import __version__

    tensors = program.tensors()
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    names = ("qweight", "scale", "zero_point", "correction")
    joined = joined_layers(program.graph)

    def bytes_of(site: Site) -> int:
        if site.name in joined:
            rows = joined[site.name]
            return round(rows.share * sum(sizes.get(f"{rows.path}.{name}", 0) for name in names))
        held = [site.weight] if site.bits is None else _parts(site, names)
        return sum(sizes.get(name, 0) for name in held)

    layers = tuple(
        OnnxLayer(
            site=s.name,
            **{name: getattr(s, name) for name in OF_SITES},
            shape=tuple(tensors[s.weight].shape) if s.weight in tensors else None,
            bytes=bytes_of(s),
        )
        for s in program.plan
    )
    return OnnxMetadata(
        version=__version__,
        target=spec.target,
        stage=program.stage,
        history=program.history,
        signature=program.signature.to_json(),
        layers=layers,
        site_values=sites,
    ).to_text()


def _parts(site: Site, names: tuple[str, ...]) -> list[str]:
    """Names of the lowered tensors of a site."""
    parts = [str(expert) for expert in range(site.experts)] if site.experts else list(PLANE_NAMES)
    paths = [site.path, *(f"{site.path}.{part}" for part in parts)]
    return [f"{path}.{name}" for path in paths for name in names]


def _save(
    model: Any, program: Program, path: Path, spec: ExportSpec, resume: str | None
) -> ExportReport:
    onnx = require("onnx", extra="onnx", purpose="check an ONNX model")
    with atomic_files(path, overwrite=spec.overwrite, resume=resume) as output:
        scratch = output.with_suffix(SUFFIXES["onnx"])
        kept = write_model(model, scratch, external_data=spec.external_data)
        try:
            onnx.checker.check_model(str(scratch))
        except onnx.checker.ValidationError as error:
            raise InternalError(f"the ONNX checker refuses the model: {error}") from error
        data = data_file(scratch)
        if spec.format == "ort":
            convert_to_ort(scratch, output)
            scratch.unlink()
            data.unlink(missing_ok=True)
        elif not spec.external_data and data.is_file() and fits_in_one_file(data.stat().st_size):
            join_weights(scratch)
        sizes = {f.name: f.stat().st_size for f in output.parent.iterdir()}
    nodes = list(model.graph.all_nodes())
    declared = capabilities(spec)
    if any(step.startswith("widen-halves") for step in program.history):
        declared = _of_widened(declared)
    return ExportReport(
        path=path,
        files=sizes,
        target=spec.target,
        nodes=len(nodes),
        quantized_layers=sum(map(_is_layer, nodes)) + _joined_with_others(program),
        capabilities=declared,
        kept=kept,
    )


def _joined_with_others(program: Program) -> int:
    """How many layers are computed by the node of another."""
    joined = joined_layers(program.graph).values()
    return len(joined) - len({rows.path for rows in joined})


def _is_layer(node: Any) -> bool:
    """Whether a node is a quantized layer or dequantizes the weight of one.

    The high plane of a layer in two planes is no layer of its own.
    """
    if any(v is not None and (v.name or "").endswith(HIGH_CODES) for v in node.inputs):
        return False
    if (node.domain, node.op_type) in ((MICROSOFT, "MatMulNBits"), (QALORA, "GroupQuantLinear")):
        return True
    return node.op_type == "DequantizeLinear" and "block_size" in node.attributes


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """How exactly a target keeps each property of a program that computes in float32."""
    parameter = EXACT if spec.parameter_dtype == "float32" else rounds(spec.parameter_dtype)
    zero_point = Capability("exact", "integer part and float32 correction")
    if spec.target == "ort":
        zero_point = parameter
    elif spec.correction == "digits":
        zero_point = rounds("integer part and correction in digits")
    activations = _ACTIVATIONS[spec.accuracy_level]
    if spec.target == "onnx":
        activations = Capability("exact", f"in ONNX Runtime with {QDQ_ACCURACY_KEY}=0")
    return {
        "codes": EXACT,
        "scale": parameter,
        "zero_point": zero_point,
        "float tensors": EXACT,
        "activations": activations,
    }


def _of_widened(declared: dict[str, Capability]) -> dict[str, Capability]:
    """The same for a program that computes in half precision."""
    if declared["activations"] != EXACT:
        return declared
    return declared | {
        "activations": Capability("exact", "half-precision model computed in float32")
    }
