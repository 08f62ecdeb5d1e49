"""`write_checkpoint`: a program as a checkpoint of another library, by target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qalora_compile._version import __version__
from qalora_compile.config import ExportSpec
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.capability import Capability, ExportReport, StoredTensor
from qalora_compile.exporters.checkpoints import compressed_tensors, float, gptq, hqq, mlx, qalora
from qalora_compile.exporters.checkpoints.gguf import write
from qalora_compile.exporters.checkpoints.named_tensors import Checkpoint, read_checkpoint
from qalora_compile.files import atomic_files, atomic_folder, write_json
from qalora_compile.ir.model_description import Description
from qalora_compile.ir.program import Program

RECORD_FILE = "export.json"
FORMAT, VERSION = "qalora-export", 1

Write = Callable[[Checkpoint, Path, ExportSpec], list[StoredTensor]]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format that can be written.

    Attributes:
        library: Who reads it.
        capabilities: What it does to each property of a program.
        write: Writes into the file or folder, and gives a row for each tensor.
        suffix: Of the file; empty where a folder is written.
        notes: What the report has to say beside its rows.
    """

    library: str
    capabilities: Callable[[ExportSpec], dict[str, Capability]]
    write: Write
    suffix: str = ""
    notes: Callable[[Checkpoint], tuple[str, ...]] = Checkpoint.notes


FORMATS = {
    "gguf": Format("llama.cpp", write.capabilities, write.write_gguf, ".gguf", write.notes),
    "mlx": Format("mlx-lm", mlx.capabilities, mlx.write_mlx),
    "float": Format("transformers", float.capabilities, float.write_float),
    "hqq": Format("HQQ", hqq.capabilities, hqq.write_hqq),
    "safetensors": Format("docs/formats.md", qalora.capabilities, qalora.write_own),
    "gptq": Format("GPTQModel", gptq.capabilities, gptq.write_gptq),
    "compressed-tensors": Format(
        "compressed-tensors, vLLM",
        compressed_tensors.capabilities,
        compressed_tensors.write_compressed,
    ),
}


def check_path(path: Path, spec: ExportSpec) -> None:
    """Refuse the name of a file where a folder is written, and the reverse.

    Raises:
        UserInputError: the path does not fit the target.
    """
    suffix = FORMATS[spec.target].suffix
    if suffix and path.suffix != suffix:
        raise UserInputError(f"{path} does not end in {suffix}", where=str(path))
    if not suffix and path.is_file():
        raise UserInputError(
            f"{path} is a file; target {spec.target} writes a folder", where=str(path)
        )


def write_checkpoint(
    program: Program, path: Path, spec: ExportSpec, description: Description | None
) -> ExportReport:
    """Write a folded or quantized program as a checkpoint, whole or not at all.

    Args:
        program: See `read_checkpoint`.
        path: A file or folder, by target.
        spec: Target and options.
        description: Of the model; some targets do without.

    Raises:
        PreconditionError: the program is at another stage.
        UnsupportedError: the format cannot hold a part of the program.
        UserInputError: a value is beyond the format, or the path does not fit or exists.
    """
    kind = FORMATS[spec.target]
    check_path(path, spec)
    checkpoint = read_checkpoint(program, description)
    report = ExportReport(
        path=path,
        files={},
        target=spec.target,
        nodes=0,
        quantized_layers=len(checkpoint.layers),
        capabilities=kind.capabilities(spec),
        notes=kind.notes(checkpoint),
    )
    place = atomic_files if kind.suffix else atomic_folder
    with place(path, overwrite=spec.overwrite) as scratch:
        stored = tuple(kind.write(checkpoint, scratch, spec))
        report = dataclasses.replace(report, stored=stored)
        if not kind.suffix:
            write_record(scratch, report, spec)
        folder = scratch.parent if kind.suffix else scratch
        sizes = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
    return dataclasses.replace(report, files=sizes)


def write_record(folder: Path, report: ExportReport, spec: ExportSpec) -> None:
    """Write what is known of a checkpoint beside it: `export.json`."""
    write_json(folder / RECORD_FILE, export_record(report, spec))


def export_record(report: ExportReport, spec: ExportSpec) -> dict[str, Any]:
    """The report as JSON types; what was replaced says nothing of what was written."""
    options = {name: value for name, value in spec.to_json().items() if name != "overwrite"}
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"qalora-compile {__version__}",
        "export": options,
        "quantized_layers": report.quantized_layers,
        "capabilities": {name: str(value) for name, value in report.capabilities.items()},
        "notes": list(report.notes),
        "tensors": [dataclasses.asdict(row) for row in report.stored],
    }
