"""`write_coreml`: a legalized program as an `.mlpackage`."""

from __future__ import annotations

import shutil
from pathlib import Path

from qalora_compile.config import ExportSpec
from qalora_compile.errors import UnsupportedError
from qalora_compile.exporters.capability import EXACT, Capability, ExportReport
from qalora_compile.exporters.coreml.check import check_weights
from qalora_compile.exporters.coreml.convert import convert, without_bfloat16
from qalora_compile.exporters.coreml.package import describe, write_package
from qalora_compile.exporters.onnx.write import metadata_text
from qalora_compile.exporters.traced import with_values
from qalora_compile.files import atomic_folder
from qalora_compile.ir.coreml_package import main_block
from qalora_compile.ir.program import Program

_SCRATCH = "converted.mlpackage"


def write_coreml(program: Program, path: Path, spec: ExportSpec) -> ExportReport:
    """Convert, write, read again and compare.

    Args:
        program: Legalized for the target, or a float program (see `api.lower`).
        path: The `.mlpackage` folder.
        spec: Options.

    Raises:
        UnsupportedError: the program has a key-value cache, or coremltools cannot convert it.
        InternalError: a quantized weight of the package differs from the program's.
        UserInputError, OutputError: see `files.atomic_folder`.
    """
    if program.signature.cache:
        raise UnsupportedError(
            "a key-value cache has no form in target coreml",
            hint="write one pass over complete sequences (export --no-kv-cache); targets ort and "
            "openvino hold a cache",
        )
    program = without_bfloat16(with_values(program))
    with atomic_folder(path, overwrite=spec.overwrite) as folder:
        made = folder / _SCRATCH
        model, weights, sites = convert(program, made)
        describe(model, metadata_text(program, spec, sites))
        write_package(made, model, folder)
        shutil.rmtree(made)
        count = check_weights(program, weights, folder)
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    same = f"{count} quantized weights, read from the package again, are the program's bit for bit"
    unrun = "no Apple device ran the model"
    return ExportReport(
        path=path,
        files=sizes,
        target=spec.target,
        nodes=sum(op.type != "const" for op in main_block(model).operations),
        quantized_layers=weights.layers,
        capabilities=capabilities(spec),
        notes=(same, unrun) if count else (unrun,),
    )


def capabilities(spec: ExportSpec) -> dict[str, Capability]:
    """How exactly the target keeps each property of a program."""
    return {
        "codes": Capability("exact", "2 and 3 bits stored in 4"),
        "scale": EXACT,
        "zero_point": Capability("exact", "a real number, rounded once to float32"),
        "float tensors": EXACT,
        "activations": Capability("exact", "float32, on CPU and GPU; never run on an Apple device"),
    }
