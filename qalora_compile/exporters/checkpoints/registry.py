"""`write_checkpoint`: write a program as a checkpoint of another library, by target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from qalora_compile.config import ExportSpec
from qalora_compile.errors import UserInputError
from qalora_compile.exporters.capability import ExportReport, StoredTensor
from qalora_compile.exporters.checkpoints import compressed_tensors, float, gptq, hqq, mlx, qalora
from qalora_compile.exporters.checkpoints.gguf import write
from qalora_compile.exporters.checkpoints.named_tensors import Checkpoint, read_checkpoint
from qalora_compile.exporters.record import write_record
from qalora_compile.exporters.targets import Target, get_target, refuse_file
from qalora_compile.files import atomic_files, atomic_folder
from qalora_compile.ir.model_description import Description
from qalora_compile.ir.program import Program

Write = Callable[[Checkpoint, Path, ExportSpec], list[StoredTensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format(Target):
    """A checkpoint format that can be written.

    Attributes:
        write: Writes the file or folder, and returns a row for each tensor.
        suffix: Suffix of the file; empty if a folder is written.
        notes: Returns notes for the report.
    """

    on_codes: ClassVar[bool] = True

    write: Write
    suffix: str = ""
    notes: Callable[[Checkpoint], tuple[str, ...]] = Checkpoint.notes


GGUF = Format(
    library="llama.cpp",
    capabilities=write.capabilities,
    write=write.write_gguf,
    suffix=".gguf",
    notes=write.notes,
)
MLX = Format(library="mlx-lm", capabilities=mlx.capabilities, write=mlx.write_mlx)
FLOAT = Format(library="transformers", capabilities=float.capabilities, write=float.write_float)
HQQ = Format(library="HQQ", capabilities=hqq.capabilities, write=hqq.write_hqq)
SAFETENSORS = Format(
    library="docs/reference/formats.md", capabilities=qalora.capabilities, write=qalora.write_own
)
GPTQ = Format(library="GPTQModel", capabilities=gptq.capabilities, write=gptq.write_gptq)
COMPRESSED_TENSORS = Format(
    library="compressed-tensors, vLLM",
    capabilities=compressed_tensors.capabilities,
    write=compressed_tensors.write_compressed,
)


def get_format(name: str) -> Format:
    """The checkpoint format of a target."""
    found = get_target(name)
    assert isinstance(found, Format), "the caller asked `ExportSpec.is_checkpoint`"
    return found


def check_path(path: Path, spec: ExportSpec) -> None:
    """Refuse a file name if the target is a folder, and vice versa.

    Raises:
        UserInputError: the path does not fit the target.
    """
    suffix = get_format(spec.target).suffix
    if suffix and path.suffix != suffix:
        raise UserInputError(f"{path} does not end in {suffix}", where=str(path))
    if not suffix:
        refuse_file(path, spec)


def write_checkpoint(
    program: Program, path: Path, spec: ExportSpec, description: Description | None
) -> ExportReport:
    """Write a folded or quantized program as a checkpoint, completely or not at all.

    Args:
        program: See `read_checkpoint`.
        path: A file or folder, by target.
        spec: Target and options.
        description: Of the model; some targets do not need it.

    Raises:
        PreconditionError: the program is at another stage.
        UnsupportedError: the format cannot hold a part of the program.
        UserInputError: a value is beyond the format, or the path does not fit or exists.
    """
    kind = get_format(spec.target)
    check_path(path, spec)
    checkpoint = read_checkpoint(program, description)
    report = ExportReport(
        path=path,
        files={},
        target=spec.target,
        nodes=0,
        quantized_layers=len(checkpoint.layers),
        capabilities={
            name: capability
            for name, capability in kind.capabilities(spec).items()
            if not checkpoint.lacks(name)
        },
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
