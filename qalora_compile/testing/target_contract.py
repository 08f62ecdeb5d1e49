"""`check_target`: the contract of an export target."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from qalora_compile.api import (
    complete_spec,
    export_model,
    fold_adapters,
    insert_adapters,
    lower,
    quantize_groups,
)
from qalora_compile.capture.model import capture_model
from qalora_compile.config import AdapterSpec, ExportSpec, QuantSpec
from qalora_compile.errors import PreconditionError, QaloraError, UserInputError
from qalora_compile.exporters.capability import Capability, ExportReport
from qalora_compile.exporters.targets import LoweredTarget, get_target
from qalora_compile.ir.lazy_tensor import make_lazy
from qalora_compile.ir.program import Program
from qalora_compile.ir.spec import validate
from qalora_compile.ir.stages import LEGALIZED
from qalora_compile.ir.torch_internals import FakeTensorMode
from qalora_compile.passes.framework.base import validating
from qalora_compile.testing.contract import Contract, bits_of_all
from qalora_compile.verify.compare import Tolerance
from qalora_compile.verify.equivalence import verify_equivalence
from qalora_compile.verify.inputs import sample_inputs

_KINDS = ("exact", "rounds", "unsupported")


def check_target(
    name: str,
    program: Program | None = None,
    *,
    max_rel: float = 1e-5,
    spec: ExportSpec | None = None,
    model: nn.Module | None = None,
    file_name: str = "out",
) -> None:
    """Assert that a registered target keeps the contract of targets.

    The clauses:
      * specification: `ExportSpec(target=name)` is accepted, converts to JSON and back, and refuses
        options that the target does not take;
      * lowering (not for checkpoints): the passes end at stage `legalized:<name>`, the result
        satisfies the specification of that stage, agrees with the program within `max_rel`, and is
        exported by the target and refused by other targets;
      * stages: a program that is not quantized, or not folded, is refused;
      * capability: every entry is exact, rounds or unsupported, the report has the declared ones,
        and if all are exact no stored weight differs from the program's;
      * files: those that the report names exist with their sizes, and a second export has the same
        bytes;
      * purity: the program does not change;
      * atomicity: if reading a weight fails, or a tensor is not finite, nothing is left at the path
        or next to it;
      * replacement: existing output is kept without `overwrite`, and replaced with it.

    Args:
        name: Name of the target.
        program: A folded program; None takes two small linear layers, with a tail group and a bias.
        max_rel: Largest difference of an output after lowering, relative to its scale.
        spec: Options of the target; None takes the defaults.
        model: The model that the program was made from, for checkpoints that need it.
        file_name: Name of the output, with the suffix that the target needs.

    Raises:
        ContractError: a clause does not hold; it is named.
    """
    __tracebackhide__ = True
    contract = Contract(f"the target {name}")
    with contract.clause("specification: ExportSpec accepts the name, and goes to JSON and back"):
        target, spec = get_target(name), spec or ExportSpec(target=name)
        assert ExportSpec.from_json(spec.to_json()) == spec
    program = _folded() if program is None else program
    text, tensors = str(program), bits_of_all(program.tensors())

    def export(given: Program, path: Path, overwrite: bool = False) -> ExportReport:
        made = dataclasses.replace(spec, overwrite=overwrite)
        return export_model(given, path, made, model=model)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if isinstance(target, LoweredTarget):
            _check_lowering(contract, program, spec, max_rel)
        report = _check_files(contract, export, program, folder, file_name)
        _check_capability(contract, report)
        _check_refusals(contract, export, program, folder, file_name)
        _check_replacement(contract, export, program, folder, file_name)
    now = bits_of_all(program.tensors())
    contract.need("purity: the program stays as it is", (str(program), now) == (text, tensors), "")


_Export = Callable[..., ExportReport]


def _folded() -> Program:
    """Two linear layers, one of them with a tail group, with random adapters folded."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 6, bias=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    captured = capture_model(model, (torch.randn(3, 40, generator=generator),))
    program = insert_adapters(quantize_groups(captured, QuantSpec()), AdapterSpec(rank=2))
    with torch.no_grad():
        for parameter in program.adapter_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return fold_adapters(program)


def _check_lowering(contract: Contract, program: Program, spec: ExportSpec, max_rel: float) -> None:
    with contract.clause("lowering: the passes end at the stage of the target, and it is valid"):
        with validating():
            lowered = lower(program, complete_spec(program, spec))
        assert lowered.stage == f"{LEGALIZED}{spec.target}", f"the stage is {lowered.stage}"
        validate(lowered)
        assert lower(lowered, spec) is lowered, "a lowered program is lowered again"
    with contract.clause("lowering: the lowered program computes the same"):
        calls = sample_inputs(program, 2)
        found = verify_equivalence(program, lowered, calls, Tolerance(max_rel=max_rel))
        assert found.passed, str(found)
    other = dataclasses.replace(lowered, stage=f"{LEGALIZED}another")
    with contract.refuses("lowering: a program for another target", PreconditionError):
        lower(other, spec)


def _check_files(
    contract: Contract, export: _Export, program: Program, folder: Path, file_name: str
) -> ExportReport:
    with contract.clause("files: the program is exported"):
        for number in range(2):
            (folder / str(number)).mkdir()
        report, again = (export(program, folder / str(n) / file_name) for n in range(2))
    with contract.clause("files: the report names those that are there, with their sizes"):
        path = folder / "0" / file_name
        home = path if path.is_dir() else path.parent
        found = {name: file.stat().st_size for name, file in _files_in(home).items()}
        assert report.files == found, f"{report.files}, not {found}"
        assert report.quantized_layers > 0, "no layer is quantized"
    with contract.clause("files: a second export has the same bytes"):
        for file in report.files:
            twin = Path(str(home).replace(str(folder / "0"), str(folder / "1"), 1)) / file
            assert (home / file).read_bytes() == twin.read_bytes(), f"{file} differs"
        assert report.stored == again.stored, "the rows of the report differ"
    return report


def _files_in(folder: Path) -> dict[str, Path]:
    """Path below a folder → file."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file for file in files}


def _check_capability(contract: Contract, report: ExportReport) -> None:
    with contract.clause("capability: every entry is exact, rounds or unsupported"):
        assert report.capabilities, "nothing is declared"
        for entry in report.capabilities.values():
            assert isinstance(entry, Capability) and entry.kind in _KINDS, f"{entry!r}"
    kinds = {entry.kind for entry in report.capabilities.values()}
    with contract.clause("capability: where all is exact, no stored weight differs"):
        off = [row.name for row in report.stored if row.max_abs_error > 0]
        assert "rounds" in kinds or not off, f"{off[0]} differs"


def _check_refusals(
    contract: Contract, export: _Export, program: Program, folder: Path, file_name: str
) -> None:
    """Invalid exports are refused and leave nothing."""
    home = folder / "refused"
    home.mkdir()
    for stage in ("float", "adapted"):
        with contract.refuses(f"stages: a program at stage {stage}", PreconditionError):
            export(dataclasses.replace(program, stage=stage), home / file_name)
    broken = _with_first(program, float("nan"))
    with contract.refuses("atomicity: a tensor that is not finite", UserInputError):
        export(broken, home / file_name)
    try:
        export(_unreadable(program), home / file_name)
    except Exception:  # of any kind: the reading library chooses it
        left = [path.name for path in home.iterdir()]
        contract.need("atomicity: nothing is left after a failure", not left, ", ".join(left))
    else:
        contract.need("atomicity: a weight that cannot be read fails the export", False, "")


def _with_first(program: Program, value: float) -> Program:
    """The program with another value in the first scale."""
    tensors = program.tensors()
    name = next(name for name in tensors if name.endswith(".scale"))
    scale = tensors[name].detach().clone()
    scale[0, 0] = value
    tensors[name] = nn.Parameter(scale, requires_grad=False)
    return program.evolve(graph=program.copy_graph(), tensors=tensors)


def _unreadable(program: Program) -> Program:
    """The program with last codes that cannot be read when they are asked for."""

    def fail() -> torch.Tensor:
        raise OSError("the file of weights is gone")

    tensors = program.tensors()
    name = [name for name in tensors if name.endswith(".qweight")][-1]
    tensors[name] = make_lazy(fail, tensors[name], FakeTensorMode())
    return program.evolve(graph=program.copy_graph(), tensors=tensors)


def _check_replacement(
    contract: Contract, export: _Export, program: Program, folder: Path, file_name: str
) -> None:
    path = folder / "0" / file_name
    home = path if path.is_dir() else path.parent
    before = {name: file.read_bytes() for name, file in _files_in(home).items()}
    with contract.refuses("replacement: what is there, without overwrite", QaloraError):
        export(program, path)
    now = {name: file.read_bytes() for name, file in _files_in(home).items()}
    contract.need("replacement: what is there stays without overwrite", before == now, "it changed")
    with contract.clause("replacement: with overwrite it is replaced"):
        export(program, path, overwrite=True)
