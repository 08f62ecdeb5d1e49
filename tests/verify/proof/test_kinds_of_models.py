"""Convolutions, recurrences and experts are proved, and no fault planted in their exports is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.errors import QaloraError
from qalora_compile.verdict import PROVEN
from tests.models import slow
from tests.zoo.proofs import prove

Change = Callable[[Any], None]


def nodes(model: Any, op: str) -> list[Any]:
    """The nodes of an operator."""
    return [node for node in model.graph.node if node.op_type == op]


def attribute(op: str, name: str, value: Any, at: int = 0) -> Change:
    """Another value of an attribute."""

    def change(model: Any) -> None:
        node = nodes(model, op)[at]
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


def swapped(op: str, one: int, other: int, at: int = 0) -> Change:
    """Two operands exchanged."""

    def change(model: Any) -> None:
        names = nodes(model, op)[at].input
        assert names[one] != names[other]
        names[one], names[other] = names[other], names[one]

    return change


def renamed(old: str, new: str, at: int = 0) -> Change:
    """Another operator."""

    def change(model: Any) -> None:
        nodes(model, old)[at].op_type = new

    return change


def scaled(op: str, operand: int, at: int = 0) -> Change:
    """A stored operand with its last element doubled."""

    def change(model: Any) -> None:
        name = nodes(model, op)[at].input[operand]
        (stored,) = (i for i in model.graph.initializer if i.name == name)
        values = numpy_helper.to_array(stored).copy()
        values.reshape(-1)[-1] = values.reshape(-1)[-1] * 2 + 1
        stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))

    return change


def exchanged(op: str, operand: int, one: int, other: int) -> Change:
    """An operand of two nodes exchanged."""

    def change(model: Any) -> None:
        first, second = nodes(model, op)[one].input, nodes(model, op)[other].input
        assert first[operand] != second[operand]
        first[operand], second[operand] = second[operand], first[operand]

    return change


FAULTS: dict[str, dict[str, Change]] = {
    "resnet": {
        "padding moved": attribute("Conv", "pads", [0, 1, 2, 1]),
        "padding on one side": attribute("Conv", "pads", [2, 1, 0, 1], at=1),
        "dilations and padding": attribute("Conv", "pads", [1, 2, 1, 0], at=2),
        "a weight": scaled("Conv", 1),
        "a bias": scaled("Conv", 2),
        "epsilon": attribute("BatchNormalization", "epsilon", 2e-5),
        "mean for variance": swapped("BatchNormalization", 3, 4),
        "weight for bias": swapped("BatchNormalization", 1, 2),
        "a mean": scaled("BatchNormalization", 3),
        "another axis": scaled("ReduceMean", 1),
        "another residual": exchanged("Conv", 0, 1, 2),
    },
    "lstm": {
        "order of gates": swapped("Concat", 1, 2, at=1),
        "order of gates of the state": swapped("Concat", 0, 3, at=2),
        "backwards": attribute("LSTM", "direction", "reverse"),
        "a bias": scaled("LSTM", 3),
        "weights exchanged": exchanged("LSTM", 1, 0, 1),
        "input gate coupled": attribute("LSTM", "input_forget", 1),
    },
    "gru": {
        "order of gates": swapped("Concat", 0, 1, at=1),
        "reset before": attribute("GRU", "linear_before_reset", 0),
        "a bias": scaled("GRU", 3),
    },
    "batched-experts": {
        "the smallest": attribute("TopK", "largest", 0),
        "another axis of scores": attribute("Softmax", "axis", 0),
        "experts exchanged": exchanged("Gather", 1, 0, 1),
        "results exchanged": swapped("Concat", 0, 1),
        "scores for places": swapped("ScatterElements", 0, 2),
        "the router": scaled("Gemm", 1),
    },
}
SLICES: dict[str, Change] = {
    "another offset": exchanged("Slice", 2, 8, 9),
    "rows that end later": exchanged("Slice", 2, 11, 12),
    "rows that begin later": exchanged("Slice", 1, 12, 13),
    "rows of another tensor": exchanged("Slice", 0, 4, 11),
    "experts exchanged": swapped("Concat", 0, 1, at=-1),
    "sorted downward": attribute("TopK", "largest", 1, at=1),
    "the smallest scores": attribute("TopK", "largest", 0),
    "exclusive sums": attribute("CumSum", "exclusive", 1),
    "bins with their end": renamed("Less", "LessOrEqual", at=1),
    "places of another gather": exchanged("GatherND", 1, 1, 3),
    "not put back in order": exchanged("ScatterND", 1, 0, 1),
}


def judged(name: str, folder: Path, faults: dict[str, Change]) -> Iterator[str]:
    """The faults that are called proved; the export itself has to be."""
    (found,) = prove(name, folder)
    assert found.verdict in PROVEN, found.left
    edge = folder / "edge"
    path = next(p for p in (edge / "model.onnx", edge / "onnx/model_q4.onnx") if p.exists())
    for fault, change in faults.items():
        model = onnx.load(path)
        change(model)
        onnx.save(model, folder / "changed.onnx")
        try:
            verdict = qc.prove_equivalence(
                folder / "ref", folder / "changed.onnx", samples=0
            ).verdict
        except QaloraError:  # the file is refused
            continue
        if verdict in PROVEN:
            yield fault


@pytest.mark.parametrize("name", ["batched-experts", *slow("resnet", "lstm", "gru")])
def test_no_planted_fault_is_proved(name: str, tmp_path: Path) -> None:
    assert list(judged(name, tmp_path, FAULTS[name])) == []


@pytest.mark.slow
def test_no_fault_in_slices_of_experts_is_proved(tmp_path: Path) -> None:
    assert list(judged("MixtralForCausalLM", tmp_path, SLICES)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "Wav2Vec2ForSequenceClassification", "MarianMTModel"]
)
def test_complete_exports_are_proved(name: str, tmp_path: Path) -> None:
    graphs = list(prove(name, tmp_path, layers=1))
    assert len(graphs) == 1 + (name == "MarianMTModel")
    for graph in graphs:
        assert graph.verdict in PROVEN, graph.left
        assert graph.parts == graph.parts_proved > graph.sites - 1
    if len(graphs) > 1:
        sides = [str(tmp_path / side) for side in ("folded", "edge")]
        stated = str(tmp_path / "equal.json")
        assert main(["verify", *sides, "--prove", "--certificate", stated]) == 0
        for half in ("encoder", "decoder"):
            assert main(["verify", "--certificate", str(tmp_path / f"equal-{half}.json")]) == 0
