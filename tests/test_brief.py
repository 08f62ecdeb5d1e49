"""Short texts of programs, plans, reports and certificates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qalora_compile as qc
from qalora_compile.brief import Brief, megabytes
from qalora_compile.verify import compare_nodes
from tests.models import MLP


@pytest.fixture(scope="module")
def program() -> qc.Program:
    """Two layers on 4 bits."""
    captured = qc.capture_model(MLP(64, 32, 8), (torch.randn(2, 64),))
    return qc.quantize_groups(captured, qc.QuantSpec(bits=4, group_size=32))


@pytest.fixture(scope="module")
def things(program: qc.Program) -> dict[str, Any]:
    """One of each kind that has a short text."""
    call = (torch.randn(2, 64),)
    return {
        "program": program,
        "plan": program.plan,
        "report": qc.verify_equivalence(program, program, [call], qc.Tolerance(max_abs=0.0)),
        "numeric": compare_nodes(program, program, {"one": call}),
        "certificate": qc.prove_equivalence(program, program),
    }


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("program", ["<Program", "stage: quantized", "at 4 bits", "kB", "float32[", "64]"]),
        ("plan", ["<SitePlan", "to quantize", "at 4 bits"]),
        ("report", ["<Report", "verdict: EQUAL", "inputs: 1", "max_abs 0", "difference: 0"]),
        ("numeric", ["<NumericReport", "verdict: EQUAL", "as a program (EQUAL)"]),
        ("certificate", ["<Certificate", "verdict: PROVED", "for all inputs: yes", "proved"]),
    ],
)
def test_a_repr_is_short_and_says_what_it_is(
    things: dict[str, Any], kind: str, words: list[str]
) -> None:
    text = repr(things[kind])
    assert all(word in text for word in words), text
    assert len(text) < 600
    assert "tensor(" not in text


@pytest.mark.parametrize("kind", ["program", "plan", "report", "numeric", "certificate"])
def test_a_notebook_shows_a_table(things: dict[str, Any], kind: str) -> None:
    text = things[kind]._repr_html_()
    assert text.startswith("<table>") and text.endswith("</table>")
    assert text.count("<tr>") == text.count("</tr>") >= 2
    assert "<script" not in text and "http" not in text


class Named(Brief):
    """Of one fact."""

    def __init__(self, text: object) -> None:
        self.text = text

    def brief(self) -> dict[str, object]:
        """The fact, and one that is empty."""
        return {"a<b": self.text, "nothing": None}


def test_texts_are_escaped_and_cut() -> None:
    assert "<i>" not in Named("<i>&")._repr_html_()
    assert "&lt;i&gt;&amp;" in Named("<i>&")._repr_html_()
    assert repr(Named("two\nlines")) == "<Named  a<b: two lines>"
    assert len(repr(Named("x" * 9999))) < 330


@pytest.mark.parametrize(("size", "text"), [(950, "0.9 kB"), (1_500_000, "1.5 MB")])
def test_sizes_are_in_units(size: int, text: str) -> None:
    assert megabytes(size) == text
