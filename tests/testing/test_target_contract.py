"""Every target keeps the contract of targets, and one that breaks it is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import qalora_compile as qc
from qalora_compile import extend
from qalora_compile.config import CHECKPOINT_TARGETS, GRAPH_TARGETS, ONNX_TARGETS
from qalora_compile.ir.program import Program
from qalora_compile.registry import TARGETS
from qalora_compile.testing import ContractError, check_target
from tests.exporters.checkpoint_cases import llama_and_program, with_integer_zeros

INTEGER = ("gptq", "compressed-tensors")
NAMES = dict.fromkeys(ONNX_TARGETS, "model.onnx") | {
    "gguf": "model.gguf",
    "openvino": "model.xml",
    "torch": "model.pt2",
    "coreml": "model.mlpackage",
}


@pytest.mark.parametrize("name", ONNX_TARGETS)
def test_every_onnx_target_keeps_the_contract(name: str) -> None:
    check_target(name, file_name=NAMES[name])


def test_the_openvino_target_keeps_the_contract() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    check_target("openvino", file_name=NAMES["openvino"])


@pytest.mark.slow
def test_the_torch_target_keeps_the_contract() -> None:
    check_target("torch", file_name=NAMES["torch"])


def test_the_coreml_target_keeps_the_contract() -> None:
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    check_target("coreml", file_name=NAMES["coreml"])


@pytest.mark.parametrize("name", CHECKPOINT_TARGETS)
def test_every_checkpoint_target_keeps_the_contract(name: str) -> None:
    model, program = llama_and_program()
    program = with_integer_zeros(program) if name in INTEGER else program
    check_target(name, program, model=model, file_name=NAMES.get(name, "model"))


def test_these_are_all() -> None:
    assert TARGETS.builtin == (*GRAPH_TARGETS, *CHECKPOINT_TARGETS)


def write(program: Program, folder: Path, spec: qc.ExportSpec) -> list[extend.StoredTensor]:
    (folder / "model.txt").write_text(str(program), "utf-8")
    for tensor in program.tensors().values():
        extend.materialize(tensor)
    return [extend.StoredTensor(name, name, "text") for name in program.tensors()]


GOOD = extend.FolderTarget(
    library="readers of text",
    lowering=lambda program, spec: "legalize-onnx,rename-stage",
    write=write,
    capabilities=lambda spec: {"codes": extend.EXACT},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenameStage(extend.Pass):
    """Says that what is lowered to ONNX is lowered to the planted target."""

    name = "rename-stage"
    consumes = ("legalized:onnx",)
    produces = "legalized:planted"

    scale: float = 1.0

    def call(self, program: qc.Program) -> extend.PassResult:
        """Copy, and scale a tensor where that is asked for."""
        tensors = program.tensors()
        name = next(name for name in tensors if name.endswith(".scale"))
        tensors[name] = tensors[name] * self.scale
        return extend.PassResult(program.evolve(graph=program.copy_graph(), tensors=tensors))


def check(target: extend.Target) -> None:
    with extend.scoped():
        extend.register_pass(RenameStage)
        extend.register_target("planted", target)
        check_target("planted")


def test_a_target_of_an_extension_keeps_it() -> None:
    check(GOOD)


_count: list[int] = []


def counting(program: Program, folder: Path, spec: qc.ExportSpec) -> list[extend.StoredTensor]:
    _count.append(1)
    (folder / "number.txt").write_text(str(len(_count)), "utf-8")
    return write(program, folder, spec)


def careless(program: Program, folder: Path, spec: qc.ExportSpec) -> list[extend.StoredTensor]:
    (folder.parent / "aside.txt").write_text("left over", "utf-8")
    return write(program, folder, spec)


def blind(program: Program, folder: Path, spec: qc.ExportSpec) -> list[extend.StoredTensor]:
    (folder / "model.txt").write_text("nothing", "utf-8")
    return []


def lossy(program: Program, folder: Path, spec: qc.ExportSpec) -> list[extend.StoredTensor]:
    return [dataclasses.replace(row, max_abs_error=0.1) for row in write(program, folder, spec)]


def editing(program: Program, folder: Path, spec: qc.ExportSpec) -> list[extend.StoredTensor]:
    stored = write(program, folder, spec)
    bias = next(t for name, t in program.tensors().items() if name.endswith("bias"))
    bias.data.add_(1)
    return stored


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another stage": ({"lowering": lambda p, s: "legalize-onnx"}, "lowering: the passes end"),
    "no such pass": ({"lowering": lambda p, s: "legalise"}, "lowering: the passes end"),
    "another function": (
        {"lowering": lambda p, s: "legalize-onnx,rename-stage{scale=1.01}"},
        "lowering: the lowered program computes the same",
    ),
    "other bytes": ({"write": counting}, "files: a second export"),
    "left over": ({"write": careless}, "atomicity: nothing is left"),
    "nothing read": ({"write": blind}, "atomicity: a weight that cannot be read"),
    "not exact": ({"write": lossy}, "capability: where all is exact"),
    "nothing declared": ({"capabilities": lambda s: {}}, "capability: every entry"),
    "an odd word": (
        {"capabilities": lambda s: {"codes": extend.Capability("fine")}},
        "capability: every entry",
    ),
    "edited": ({"write": editing}, "purity|files|replacement"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_target_that_breaks_a_clause_is_named(fault: str) -> None:
    changes, clause = FAULTS[fault]
    with pytest.raises(ContractError, match=f"the target planted.*\n  clause: ({clause})"):
        check(dataclasses.replace(GOOD, **changes))
