"""Targets by name, and the interface of targets that lower the graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from qalora_compile.config import ExportSpec
from qalora_compile.errors import PreconditionError, UserInputError
from qalora_compile.exporters.capability import Capability, ExportReport, StoredTensor
from qalora_compile.exporters.record import write_record
from qalora_compile.files import atomic_folder
from qalora_compile.ir.program import Program
from qalora_compile.ir.stages import LEGALIZED
from qalora_compile.registry import TARGETS


@dataclass(frozen=True, kw_only=True)
class Target:
    """A value of `ExportSpec.target`: a `LoweredTarget` or a checkpoint `Format`.

    Attributes:
        library: The library that reads what is written.
        capabilities: How exactly the target keeps each property of a program.
        options: Fields of `ExportSpec` that a target of an extension takes, in addition to
            `target` and `overwrite`; others are refused.
    """

    on_codes: ClassVar[bool] = False
    """Whether codes are written without lowering, with a description of the model."""

    library: str
    capabilities: Callable[[ExportSpec], Mapping[str, Capability]]
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoweredTarget(Target, ABC):
    """A target for which passes lower the program.

    Attributes:
        lowering: Returns the text of the pipeline that takes a folded or quantized program to stage
            `legalized:<name of the target>`. Models in half precision are widened to float32 first.
    """

    writes_folder: ClassVar[bool] = False
    """Whether a built-in target is a folder, not a file with others next to it."""

    lowering: Callable[[Program, ExportSpec], str]

    @abstractmethod
    def check_path(self, path: Path, spec: ExportSpec) -> None:
        """Refuse a path that does not fit the target.

        Raises:
            UserInputError: it does not.
        """

    @abstractmethod
    def export(
        self, program: Program, path: Path, spec: ExportSpec, *, resume: str | None = None
    ) -> ExportReport:
        """Write a lowered program, completely or not at all.

        Raises:
            UserInputError: the path exists and may not be replaced, or `resume` is given and the
                target cannot continue a run.
            OutputError: the files cannot be written.
        """


@dataclass(frozen=True, kw_only=True)
class FolderTarget(LoweredTarget):
    """A target that is a folder with the files that `write` makes and `export.json`.

    Attributes:
        write: Writes a lowered program into an empty folder, which is renamed when all files are
            written; returns a row for each tensor.
    """

    write: Callable[[Program, Path, ExportSpec], Sequence[StoredTensor]]

    def check_path(self, path: Path, spec: ExportSpec) -> None:
        """Refuse a file."""
        refuse_file(path, spec)

    def export(
        self, program: Program, path: Path, spec: ExportSpec, *, resume: str | None = None
    ) -> ExportReport:
        """Write the folder.

        Raises:
            PreconditionError: the program is not lowered for this target.
        """
        if program.stage != f"{LEGALIZED}{spec.target}":
            raise PreconditionError(
                f"the program is at stage {program.stage}, not lowered for target {spec.target}",
                hint="fold its adapters first, and let its lowering end at that stage",
            )
        if resume is not None:
            raise UserInputError(f"resume is given for target {spec.target}", hint="leave it out")
        report = ExportReport(
            path=path,
            files={},
            target=spec.target,
            nodes=0,
            quantized_layers=len(list(program.plan.weights_to_quantize())),
            capabilities=dict(self.capabilities(spec)),
        )
        with atomic_folder(path, overwrite=spec.overwrite) as folder:
            report = replace(report, stored=tuple(self.write(program, folder, spec)))
            write_record(folder, report, spec)
            sizes = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
        return replace(report, files=sizes)


def refuse_file(path: Path, spec: ExportSpec) -> None:
    """Refuse a path that is a file if the target writes a folder.

    Raises:
        UserInputError: the path is a file.
    """
    if path.is_file():
        raise UserInputError(
            f"{path} is a file; target {spec.target} writes a folder", where=str(path)
        )


def register_target(name: str, target: Target) -> None:
    """Register a target under a name, as a value of `ExportSpec.target`.

    Raises:
        ExtensionError: the name is taken, or `target` is neither a `LoweredTarget` nor a `Format`.
    """
    TARGETS.add(name, _checked(name, target))


def get_target(name: str) -> Target:
    """The target of a name that `ExportSpec` accepts.

    Raises:
        ExtensionError: its package cannot be imported, or defines something else.
    """
    return _checked(name, TARGETS.load(name))


def _checked(name: str, found: object) -> Target:
    if not isinstance(found, Target):
        raise TARGETS.unfit(name, "a LoweredTarget or a Format")
    return found
