"""`write_openvino`: a legalized program as `.xml` and `.bin`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qalora_compile.config import ExportSpec
from qalora_compile.exporters.capability import EXACT, Capability, ExportReport, rounds
from qalora_compile.exporters.onnx.write import metadata_text
from qalora_compile.exporters.openvino.convert import convert, layers_of
from qalora_compile.exporters.openvino.interface import make_stateful, name_interface
from qalora_compile.exporters.openvino.library import openvino
from qalora_compile.exporters.openvino.weights import Weights
from qalora_compile.files import atomic_files
from qalora_compile.files.marks import PRODUCER
from qalora_compile.ir.meta import ONNX_METADATA_KEY, OPENVINO_SETTINGS, site_of
from qalora_compile.ir.ops.views import argument
from qalora_compile.ir.program import Program

_ADD, _CAST = torch.ops.aten.add.Tensor, torch.ops.aten.to.dtype


def write_openvino(program: Program, path: Path, spec: ExportSpec) -> ExportReport:
    """Convert, name and write.

    Args:
        program: Legalized for the target, or a float program (see `api.lower`).
        path: The `.xml` file; the weights are in a `.bin` file next to it.
        spec: Options.

    Raises:
        UnsupportedError: the frontend has no rule for an operator.
        UserInputError, OutputError: see `files.atomic_files`.
    """
    model, weights = convert(program)
    name_interface(model, program)
    sites = _name_sites(program, weights)
    if spec.stateful and program.signature.cache:
        make_stateful(model, program)
    model.set_friendly_name(PRODUCER)
    _name_nodes(model, {*sites.values(), *weights.names()})
    model.set_rt_info(metadata_text(program, spec, sites), [ONNX_METADATA_KEY])
    for key, value in OPENVINO_SETTINGS.items():
        model.set_rt_info(value, ["runtime_options", key])
    with atomic_files(path, overwrite=spec.overwrite) as scratch:
        # `save_model` also runs passes, which add nodes with names from a global counter.
        openvino().serialize(model, str(scratch), str(scratch.with_suffix(".bin")))
        sizes = {file.name: file.stat().st_size for file in sorted(scratch.parent.iterdir())}
    return ExportReport(
        path=path,
        files=sizes,
        target=spec.target,
        nodes=sum(node.get_type_name() != "Constant" for node in model.get_ops()),
        quantized_layers=weights.layers,
        capabilities=capabilities(spec),
    )


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """How exactly the target keeps each property of a program."""
    parameter = EXACT if spec.parameter_dtype == "float32" else rounds(spec.parameter_dtype)
    return {
        "codes": EXACT,
        "scale": parameter,
        "zero_point": parameter,
        "float tensors": EXACT,
        "activations": Capability("exact", "with INFERENCE_PRECISION_HINT=f32"),
    }


def _name_sites(program: Program, weights: Weights) -> dict[str, str]:
    """Name the nodes of sites; returns site name → name of the node that computes its output.

    Left out are sites whose layer has an adapter that is not folded.
    """
    found: dict[str, str] = {}
    used = {key: iter(made) for key, made in weights.made.items()}
    for node, path in layers_of(program):
        made, site = next(used[path, str(node.target)]), site_of(node)
        if site is None:
            site = _site_of_sum(node)
            if site is None:
                continue
            (target,) = made.output(0).get_target_inputs()
            name = f"{site}/Bias"
            target.get_node().set_friendly_name(name)
        else:
            name = f"{site}/{made.get_type_name()}"
        made.set_friendly_name(f"{site}/{made.get_type_name()}")
        found[site] = name
    return found


def _site_of_sum(product: fx.Node) -> str | None:
    """The site whose output is the sum of a product and a stored bias."""
    (reader, *more) = product.users
    if more or reader.target is not _ADD or argument(reader, "self") is not product:
        return None
    bias = argument(reader, "other")
    if isinstance(bias, fx.Node) and bias.target is _CAST:
        bias = argument(bias, "self")
    return site_of(reader) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _name_nodes(model: Any, kept: Collection[str]) -> None:
    """Number the nodes that have no name of ours: the frontend's come from a global counter."""
    for index, node in enumerate(model.get_ordered_ops()):
        name = node.get_friendly_name()
        if node.get_name() == name or (name not in kept and "/" in name):
            node.set_friendly_name(f"{node.get_type_name()}_{index}")
