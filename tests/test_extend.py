"""Extensions in use: in pipelines, histories, specifications, exports and on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile import extend
from qalora_compile.cli.main import main
from qalora_compile.errors import ExtensionError, UnsupportedError, UserInputError
from qalora_compile.passes.recipes.replay import replay
from qalora_compile.quantizers.minmax import quantize_minmax
from qalora_compile.registry import QUANTIZERS, TARGETS
from tests.models import MLP, worst

X = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, kw_only=True)
class ShiftBiases(extend.Pass):
    """Adds a number to the biases."""

    name: ClassVar[str] = "shift-biases"
    consumes: ClassVar[tuple[str, ...]] = ("quantized",)
    produces: ClassVar[str | None] = None

    by: float = 1.0
    names: tuple[str, ...] = ()

    def call(self, program: qc.Program) -> extend.PassResult:
        """Add it."""
        tensors = program.tensors()
        odd = [n for n in tensors if n.endswith(".bias")]
        for name in odd:
            shifted = tensors[name].detach() + self.by
            tensors[name] = torch.nn.Parameter(shifted, requires_grad=False)
        after = program.evolve(graph=program.copy_graph(), tensors=tensors)
        return extend.PassResult(after, tuple(extend.Change(name, "shifted") for name in odd))


def quantize_half(
    weight: Tensor, spec: qc.QuantSpec, statistics: extend.ActivationStatistics | None
) -> extend.QuantizedWeight:
    return extend.QuantizedWeight(quantize_minmax(weight, spec), ("by half",))


def write_text(program: qc.Program, folder: Path, spec: qc.ExportSpec) -> list[extend.StoredTensor]:
    (folder / "model.txt").write_text(str(program), "utf-8")
    return [extend.StoredTensor("model", "model", "text")]


@dataclass(frozen=True, kw_only=True)
class LegalizeText(extend.Pass):
    """Renames the stage: text holds any operator."""

    name: ClassVar[str] = "legalize-text"
    consumes: ClassVar[tuple[str, ...]] = ("quantized", "folded")
    produces: ClassVar[str | None] = "legalized:text"

    def call(self, program: qc.Program) -> extend.PassResult:
        """Copy."""
        return extend.PassResult(program.evolve(graph=program.copy_graph()))


TEXT = extend.FolderTarget(
    library="readers",
    lowering=lambda program, spec: "legalize-text",
    write=write_text,
    capabilities=lambda spec: {"codes": extend.rounds("text")},
    options=("parameter_dtype",),
)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with extend.scoped():
        extend.register_pass(ShiftBiases)
        extend.register_pass(LegalizeText)
        extend.register_quantizer("half", extend.Method(quantize=quantize_half))
        extend.register_target("text", TEXT)
        yield


def captured() -> qc.Program:
    torch.manual_seed(0)
    return qc.capture_model(MLP(20, 8, 4).eval(), (X,))


def shifted() -> qc.Program:
    return qc.Pipeline.parse("shift-biases{by=3,names=[a,b]}")(
        qc.quantize_groups(captured(), qc.QuantSpec(group_size=8))
    ).program


def test_a_pass_parses_with_its_options_and_stands_in_the_history() -> None:
    program = shifted()
    assert program.history[-1] == "shift-biases{by=3,names=[a,b]}"
    (step,) = qc.Pipeline.parse(program.history[-1]).passes
    assert step == ShiftBiases(by=3, names=("a", "b"))
    with pytest.raises(UserInputError, match="no option 'far'"):
        qc.Pipeline.parse("shift-biases{far=1}")


def test_it_can_be_registered_as_a_decorator() -> None:
    @extend.register_pass
    @dataclass(frozen=True, kw_only=True)
    class Another(ShiftBiases):
        """Another one."""

        name: ClassVar[str] = "shift-more"

    assert isinstance(qc.Pipeline.parse("shift-more").passes[0], Another)
    with pytest.raises(ExtensionError, match="there is a pass 'shift-biases' already"):
        extend.register_pass(dataclass(frozen=True)(type("Other", (ShiftBiases,), {})))


def test_its_history_replays_from_a_saved_program_too(tmp_path: Path) -> None:
    program = shifted()
    program.save(tmp_path / "program")
    for source in (program, qc.Program.load(tmp_path / "program")):
        again = replay(source, captured())
        assert again.history == program.history
        assert worst(again(X), program(X)) == 0.0


def test_a_history_with_a_pass_that_is_not_installed_says_which(tmp_path: Path) -> None:
    shifted().save(tmp_path / "program")
    program = qc.Program.load(tmp_path / "program")
    stranger = dataclasses.replace(
        program, history=tuple(entry.replace("shift-", "lost-") for entry in program.history)
    )
    with pytest.raises(UserInputError, match="there is no pass 'lost-biases'") as caught:
        replay(stranger, captured())
    assert "the history of the program" in str(caught.value)
    assert "entry points of qalora_compile.passes" in str(caught.value)
    assert "extend.register_pass" in str(caught.value)


def test_a_method_is_a_value_of_the_specification() -> None:
    spec = qc.QuantSpec(method="half", group_size=8)
    assert qc.QuantSpec.from_json(spec.to_json()) == spec
    program = qc.quantize_groups(captured(), spec)
    same = qc.quantize_groups(captured(), qc.QuantSpec(group_size=8))
    assert worst(program(X), same(X)) == 0.0
    assert "method=half" in program.history[-1]
    folded = qc.fold_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=2)))
    assert folded.stage == "folded"


def test_a_method_that_needs_data_is_refused_without() -> None:
    extend.register_quantizer("by-data", extend.Method(quantize=quantize_half, needs_data=True))
    spec = qc.QuantSpec(method="by-data", group_size=8)
    with pytest.raises(UserInputError, match="by-data needs calibration data"):
        qc.quantize_groups(captured(), spec)
    assert qc.quantize_groups(captured(), spec, calibration=[(X,)]).stage == "quantized"


def test_an_unknown_method_lists_the_registered_ones() -> None:
    with pytest.raises(UserInputError, match="minmax, mse, hqq, gptq, learned, half"):
        qc.QuantSpec(method="third")


@pytest.mark.parametrize("command", ["quantize", "finetune"])
def test_the_command_line_lists_registered_methods(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    assert "half" in capsys.readouterr().out.replace("\n", " ")


def test_the_command_line_lists_registered_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert "compressed-tensors,text" in "".join(capsys.readouterr().out.split())


def test_a_target_is_exported_to(tmp_path: Path) -> None:
    program = qc.quantize_groups(captured(), qc.QuantSpec(group_size=8))
    report = qc.export_model(program, tmp_path / "out", qc.ExportSpec(target="text"))
    assert (report.target, report.quantized_layers) == ("text", 2)
    assert set(report.files) == {"model.txt", "export.json"}
    assert "legalized:text" in (tmp_path / "out" / "model.txt").read_text("utf-8")
    again = qc.ExportSpec(target="text", overwrite=True)
    assert qc.export_model(program, tmp_path / "out", again).files == report.files


def test_options_that_a_target_does_not_take_are_refused() -> None:
    assert qc.ExportSpec(target="text", parameter_dtype="float16").onnx_opset == 20
    with pytest.raises(UserInputError, match="opset is 21 for target text") as caught:
        qc.ExportSpec(target="text", opset=21)
    assert "it takes parameter_dtype" in str(caught.value)
    with pytest.raises(UnsupportedError, match="no export target 'texts'") as unknown:
        qc.ExportSpec(target="texts")
    assert "compressed-tensors, text" in str(unknown.value)


@pytest.mark.parametrize("bad", [{"resume": "key"}, {"model": "folder"}])
def test_what_a_target_cannot_do_is_refused(bad: dict[str, str], tmp_path: Path) -> None:
    program = qc.quantize_groups(captured(), qc.QuantSpec(group_size=8))
    with pytest.raises(UserInputError, match=f"{next(iter(bad))}.* for target text"):
        qc.export_model(program, tmp_path / "out", qc.ExportSpec(target="text"), **bad)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(UserInputError, match="target text writes a folder"):
        qc.export_model(program, tmp_path / "file", qc.ExportSpec(target="text"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_tables_are_as_before_the_block() -> None:
    with extend.scoped():
        extend.register_quantizer("inner", extend.Method(quantize=quantize_half))
        assert QUANTIZERS.names()[-1] == "inner"
    assert "inner" not in QUANTIZERS
    assert "text" in TARGETS


def test_all_names_of_the_module_are_there() -> None:
    assert len(set(extend.__all__)) == len(extend.__all__)
    for name in extend.__all__:
        assert getattr(extend, name) is not None
