"""The assertions pass what is equal, and say of the rest what differs, where, and on what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.testing import (
    Golden,
    NotEqualError,
    assert_equivalent,
    assert_structurally_equal,
)
from qalora_compile.verify import Certificate, NumericReport, Report
from tests.models import MLP, adapted
from tests.verify.planted import find, with_graph, with_tensors


@pytest.fixture(scope="module")
def pair() -> tuple[qc.Program, qc.Program]:
    torch.manual_seed(0)
    source = adapted(MLP(40, 24, 8), (torch.randn(2, 40),))
    return source, qc.fold_adapters(source)


def wrong(program: qc.Program) -> qc.Program:
    return with_tensors(program, {f"{program.plan.sites[1].path}.offset": lambda t: t * 1.01})


def test_equal_programs_paths_and_exports_pass(
    pair: tuple[qc.Program, qc.Program], tmp_path: Path
) -> None:
    source, folded = pair
    assert_equivalent(source, folded)
    assert_structurally_equal(source, folded)
    folded.save(tmp_path / "folded")
    qc.export_model(folded, tmp_path / "model.onnx")
    assert_equivalent(tmp_path / "folded", tmp_path / "model.onnx")
    assert_structurally_equal(folded, tmp_path / "model.onnx")
    assert_equivalent(source, folded, tolerance=qc.Tolerance(max_abs=1e-5))


@pytest.mark.parametrize(
    ("by", "kind", "says"),
    [
        (("proof",), Certificate, "proof: DIFFERENT"),
        (("numeric",), NumericReport, "numeric: DIFFERENT"),
        (("numeric", "proof"), Certificate, "proof: DIFFERENT"),
    ],
)
def test_a_difference_is_named(
    pair: tuple[qc.Program, qc.Program], by: tuple[str, ...], kind: type, says: str
) -> None:
    source, folded = pair
    with pytest.raises(NotEqualError, match=says) as caught:
        assert_equivalent(source, wrong(folded), by=by)
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value.outcome, kind)
    text = str(caught.value)
    assert "reference: program (adapted)" in text and "candidate: program (folded)" in text
    assert "first difference: layers.1: " in text


def test_a_tolerance_decides_alone(pair: tuple[qc.Program, qc.Program]) -> None:
    source, folded = pair
    assert_equivalent(source, wrong(folded), tolerance=qc.Tolerance(max_abs=1.0))
    with pytest.raises(NotEqualError, match="first diverging site: layers.1") as caught:
        assert_equivalent(source, wrong(folded), tolerance=qc.Tolerance(max_abs=1e-5))
    assert isinstance(caught.value.outcome, Report)


def test_the_inputs_given_are_those_tried(pair: tuple[qc.Program, qc.Program]) -> None:
    source, folded = pair
    zeros = [(torch.zeros(2, 40),)]
    only = with_tensors(folded, {f"{folded.plan.sites[0].path}.offset": lambda t: t * 1.01})
    assert_equivalent(source, only, by=["numeric"], inputs=zeros)
    with pytest.raises(NotEqualError, match="on input 0"):
        assert_equivalent(source, only, by=["numeric"], inputs=[(torch.ones(2, 40),)])


def test_structure_alone_sees_operators_and_not_weights(
    pair: tuple[qc.Program, qc.Program],
) -> None:
    source, folded = pair
    assert_structurally_equal(source, wrong(folded))

    def retarget(graph: torch.fx.Graph) -> None:
        find(graph, "aten.tanh").target = torch.ops.aten.sigmoid.default

    with pytest.raises(NotEqualError, match="structure differs") as caught:
        assert_structurally_equal(source, with_graph(folded, retarget))
    assert "aten.tanh" in str(caught.value) and "aten.sigmoid" in str(caught.value)


@pytest.mark.parametrize("by", [(), ("luck",)])
def test_an_unknown_way_is_refused(
    pair: tuple[qc.Program, qc.Program], by: tuple[str, ...]
) -> None:
    with pytest.raises(UserInputError, match="by is"):
        assert_equivalent(*pair, by=by)


def test_golden_texts_are_written_compared_and_missed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="x.txt is missing: run pytest with --update-golden"):
        Golden(tmp_path)("x", "a\nb\n")
    Golden(tmp_path, update=True)("x", "a\nb\n")
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    Golden(tmp_path)("x", "a\nb\n")
    with pytest.raises(AssertionError, match=r"(?s)-b.*\+c.*--update-golden"):
        Golden(tmp_path)("x", "a\nc\n")
    with pytest.raises(UserInputError, match="leaves the folder"):
        Golden(tmp_path / "inner", update=True)("../y", "")


def test_a_program_is_compared_by_its_text(
    pair: tuple[qc.Program, qc.Program], tmp_path: Path
) -> None:
    Golden(tmp_path, update=True)("folded", pair[1])
    assert (tmp_path / "folded.txt").read_text("utf-8") == str(pair[1])
    Golden(tmp_path)("folded", pair[1])
    with pytest.raises(AssertionError, match="not the golden one"):
        Golden(tmp_path)("folded", pair[0])
