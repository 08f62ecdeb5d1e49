"""What ONNX Runtime hides of a file, spelled out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qalora_compile.verdict import Verdict
from qalora_compile.verify import compare_nodes, named_inputs
from qalora_compile.verify.numeric.report import NumericReport
from qalora_compile.verify.runners.onnx_session import OnnxSession, hides, spell_out
from tests.verify.model_faults import MODEL_FAULTS
from tests.verify.planted import program

SPELLED = "functions of the file instead of kernels"


def compared(model: onnx.ModelProto, folder: Path) -> NumericReport:
    onnx.save(model, folder / "model.onnx")
    calls = named_inputs(program("folded"), 2)
    return compare_nodes(program("folded"), folder / "model.onnx", calls, levels=("all",))


def with_dropout(models: Path, *, trains: bool) -> onnx.ModelProto:
    model = onnx.load(models / "ort-stock.onnx")
    next(f for f in MODEL_FAULTS if f.name == "dropout left on").plant(model)
    mode = next(t for t in model.graph.initializer if t.name == "mode")
    mode.CopyFrom(numpy_helper.from_array(np.array(trains), "mode"))
    return model


@pytest.mark.parametrize(("trains", "verdict"), [(True, Verdict.DIFFERENT), (False, Verdict.EQUAL)])
def test_a_dropout_does_as_it_says(
    trains: bool, verdict: str, models: Path, tmp_path: Path
) -> None:
    report = compared(with_dropout(models, trains=trains), tmp_path)
    assert [(mode.name, mode.verdict) for mode in report.modes] == [
        ("optimization all, kernels of ONNX Runtime", Verdict.EQUAL), (SPELLED, verdict),
    ]  # fmt: skip
    assert trains is ((report.difference or "").startswith("input of up"))
    assert [len(mode.inputs) for mode in report.modes] == [len(report.inputs), 1]


def test_what_a_dropout_keeps_is_scaled(models: Path, tmp_path: Path) -> None:
    onnx.save(with_dropout(models, trains=True), tmp_path / "model.onnx")
    session = OnnxSession(tmp_path / "model.onnx", level="disabled", spelled_out=True)
    feed = {"ids": np.arange(40).reshape(1, 40) % 40}
    node = next(n for n in session_nodes(tmp_path) if n.op_type == "Dropout")
    found = session.values([node.input[0], node.output[0]], feed)
    before, after = (found[name] for name in (node.input[0], node.output[0]))
    kept = after != 0
    assert 0.8 < float(kept.double().mean()) < 0.97, "a tenth is dropped"
    assert float((after[kept] - before[kept] / 0.9).abs().max()) < 1e-5


def session_nodes(folder: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(folder / "model.onnx").graph.node)


def test_a_function_that_this_runtime_never_takes_is_tried(models: Path, tmp_path: Path) -> None:
    model = onnx.load(models / "ort.onnx")
    assert compared(model, tmp_path).passed
    next(f for f in MODEL_FAULTS if f.name.startswith("function of MatMulNBits")).plant(model)
    report = compared(model, tmp_path)
    assert [mode.verdict for mode in report.modes] == [Verdict.EQUAL, Verdict.DIFFERENT]
    assert report.culprit is not None and report.culprit[0].name == SPELLED
    assert (report.difference or "").startswith("q: off by")


def test_a_file_that_hides_nothing_is_not_tried_once_more(models: Path) -> None:
    for name, expected in (("ort", True), ("ort-stock", False), ("onnx", False)):
        model = onnx.load(models / f"{name}.onnx")
        assert hides(model) is expected
        spell_out(model)
        assert not hides(model)
