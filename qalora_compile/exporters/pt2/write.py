"""`write_pt2`: a legalized program as `.pt2` files."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qalora_compile.config import ExportSpec
from qalora_compile.errors import OutputError, UnsupportedError
from qalora_compile.exporters.capability import EXACT, Capability, ExportReport
from qalora_compile.exporters.onnx.write import metadata_text
from qalora_compile.exporters.pt2.convert import convert
from qalora_compile.files import atomic_files
from qalora_compile.ir.packing.int4_layout import layout_name
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import INT4PACK_LINEAR
from qalora_compile.ir.torch_internals import compile_package
from qalora_compile.untrusted.pt2_file import METADATA_FILE, compiled_file

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_COMPILER = "g++"


def write_pt2(program: Program, path: Path, spec: ExportSpec) -> ExportReport:
    """Export, write and, on request, compile.

    Args:
        program: Legalized for the target, or a float program (see `api.lower`).
        path: The `.pt2` file; the compiled package is `<name>_aot.pt2` next to it.
        spec: Options.

    Raises:
        UnsupportedError: torch cannot export the graph, or cannot compile it.
        UserInputError, OutputError: see `files.atomic_files`.
    """
    exported, sites = convert(program)
    text = metadata_text(program, spec, sites)
    layers = sum(node.target is INT4PACK_LINEAR for node in program.graph.nodes)
    with atomic_files(path, overwrite=spec.overwrite) as scratch:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(exported, scratch, extra_files={METADATA_FILE: text})
        if spec.aot:
            exported.example_inputs = program.example
            compile_to(exported, compiled_file(scratch))
        sizes = {file.name: file.stat().st_size for file in sorted(scratch.parent.iterdir())}
    return ExportReport(
        path=path,
        files=sizes,
        target=spec.target,
        nodes=sum(node.op == "call_function" for node in exported.graph.nodes),
        quantized_layers=layers,
        capabilities=capabilities(spec),
        notes=(f"4-bit weights are packed for processors with {layout_name()}",) if layers else (),
    )


def check_compiler() -> None:
    """Refuse a machine that cannot compile.

    Raises:
        UnsupportedError: there is no `g++`.
    """
    if shutil.which(_COMPILER) is None:
        raise UnsupportedError(
            f"AOTInductor compiles C++, and there is no {_COMPILER} here",
            hint="install it, or export without aot (--aot): model.pt2 needs no compiler",
        )


def compile_to(exported: ExportedProgram, path: Path) -> None:
    """Compile for this machine, with the weights inside.

    Raises:
        UnsupportedError: AOTInductor fails.
        OutputError: it wrote no file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile_package(exported, str(path))
    except Exception as error:  # of the compiler, or of any lowering: many types
        first = str(error).strip().splitlines()[:1]
        raise UnsupportedError(
            f"AOTInductor cannot compile the model: {type(error).__name__}: {''.join(first)[:200]}",
            hint="export without aot (--aot): model.pt2 runs in torch",
        ) from error
    if not path.is_file():
        raise OutputError(f"AOTInductor wrote no {path.name}", where=str(path))


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """How exactly the target keeps each property of a program."""
    return {
        "codes": Capability("exact", "2 and 3 bits stored in 4, 8 bits as two planes"),
        "scale": EXACT,
        "zero_point": Capability("exact", "as offset + 8 · scale, rounded once to float32"),
        "float tensors": EXACT,
        "activations": EXACT,
    }
