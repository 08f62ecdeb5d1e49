"""The report of a training: numbers of each layer, answers, and one HTML file of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.training import Example
from qalora_compile.training.records.report_page import (
    Sample,
    check_report,
    layer_changes,
    write_report,
)
from qalora_compile.training.sample_answers import Question, answers, questions
from tests.models import MLP
from tests.pages.test_page import text_of as read
from tests.training.test_fit import language_model

LOG: list[dict[str, Any]] = [
    {
        "step": step,
        "loss": 3.0 / step,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens": 80,
        "seconds": 0.1,
        "tokens_per_second": 800.0,
    }
    for step in range(1, 5)
]


def test_changes_are_those_that_folding_makes() -> None:
    """A layer with a tail group, and pooling groups twice as wide as the quantization groups."""
    torch.manual_seed(0)
    x = torch.randn(2, 37, dtype=torch.float64)
    program = qc.capture_model(MLP(37, 6).double().eval(), (x,))
    program = qc.quantize_groups(program, qc.QuantSpec(group_size=8))
    program = qc.insert_adapters(
        program, qc.AdapterSpec(rank=3, group_size=16, dropout=0.1, pooling="mean")
    )
    for parameter in program.adapter_parameters():
        torch.nn.init.normal_(parameter)
    (change,) = layer_changes(program)
    before, after = program.tensors(), qc.fold_adapters(program).tensors()
    scale = before["layers.0.scale"]
    moved = (after["layers.0.offset"] - before["layers.0.offset"]) / scale
    assert (change.path, change.shape, change.bits, change.rank) == ("layers.0", "37×6", 4, 3)
    assert change.shift == pytest.approx(float(moved.square().mean().sqrt()))
    assert change.largest == pytest.approx(float(moved.abs().max()))
    distance = after["layers.0.offset"] - before["layers.0.offset"]
    assert change.norm == pytest.approx(float(distance.norm()))


def test_adapters_that_keep_zero_points_integer_shift_none() -> None:
    program = qc.capture_model(MLP(64, 6).eval(), (torch.randn(2, 64),))
    program = qc.quantize_groups(program, qc.QuantSpec(zero_point="integer"))
    program = qc.insert_adapters(program, qc.AdapterSpec(rank=2, kind="scale"))
    for parameter in program.adapter_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    (change,) = layer_changes(program)
    assert change.norm > 0.01
    assert change.largest < 1e-4


def test_groups_without_a_zero_point_are_left_out() -> None:
    model = MLP(16, 4)
    with torch.no_grad():
        model.get_parameter("layers.0.weight")[1] = 0.25
    program = qc.capture_model(model.eval(), (torch.randn(2, 16),))
    program = qc.insert_adapters(qc.quantize_groups(program), qc.AdapterSpec(rank=1))
    for parameter in program.adapter_parameters():
        torch.nn.init.ones_(parameter)
    (change,) = layer_changes(program)
    assert 0 < change.largest < float("inf")


def test_answers_are_the_likeliest_tokens_one_by_one() -> None:
    program = language_model(init_b=0.05)
    rows = [(5, 6, 7, 8, 9), (20, 21, 22)]
    examples = [Example(row, (-100, -100, *row[2:])) for row in rows]
    found = answers(program, examples, None)
    for row, said in zip(rows, found, strict=True):
        tokens = list(row[:2])
        while len(tokens) < len(row):
            logits = program(torch.tensor([tokens] * 2))[0]
            tokens.append(int(logits[0, -1].argmax()))
        assert said == " ".join(map(str, tokens[2:]))
    assert questions(examples, None) == [Question("5 6", "7 8 9"), Question("20 21", "22")]


def test_a_text_without_a_prompt_is_asked_for_its_second_half() -> None:
    row = (1, 2, 3, 4)
    assert questions([Example(row, row)], None) == [Question("1 2", "3 4")]


def test_the_page_holds_curves_layers_and_answers(tmp_path: Path) -> None:
    check_report()
    program = language_model(init_b=0.05)
    sample = Sample(Question("2 + 2 = <b>", "4"), "fish", "4")
    log = [row | {"held_out": 2.0 / row["step"], "held_out_accuracy": 0.5} for row in LOG]
    path = tmp_path / "report.html"
    write_report(
        path,
        log,
        layer_changes(program),
        title="Training of tiny",
        settings={"bits": 4, "group size": 32, "rank": 16, "learning rate": "0.001"},
        results={"held-out accuracy": "35.0% → 90.0%", "adapter parameters": 350405},
        samples=[sample, Sample(Question("3 + 3 =", " 6"), "6 ", "7")],
    )
    text = path.read_text("utf-8")
    assert "Training of tiny" in text
    assert text.count("<svg") == 5
    found = read(path)
    order = ["Settings", "rank 16", "What changed", "350,405", "2 + 2 = <b>", "right", "Layers"]
    body = found.partition("Layers")[2]  # after the contents
    spots = [body.find(part) for part in order]
    assert -1 not in spots and spots == sorted(spots), "settings first, then what changed"
    assert "held out" in found and "answered right to the last token" in found
    assert "100 %" in found and "tokens that carry loss" in found
    assert "down_proj 2 layers" in found and "model.layers.1.mlp.down_proj" in found
    answers = [part.split("</td>")[0] for part in text.split('data-label="wanted"')[1:]]
    marks = re.findall(r'<strong class="(good|bad) short">(.) (\w+)', text)
    assert len(answers) == 2
    assert marks == [
        ("bad", "✗", "fish"), ("good", "✓", "4"), ("good", "✓", "6"), ("bad", "✗", "7"),
    ]  # fmt: skip
    assert "2 + 2 = &lt;b&gt;" in text
    assert path.stat().st_size < 400_000


def test_classes_are_not_called_tokens(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    log = [row | {"held_out": 1.0, "held_out_accuracy": 0.5} for row in LOG]
    sample = Sample(Question("a text", "sports"), "tech", "sports")
    write_report(
        path, log, [], title="t", settings={}, results={}, samples=[sample], classifies=True
    )
    found = read(path)
    assert "Mean over the examples" in found and "into their class" in found
    assert "The likeliest class" in found
    assert "tokens that carry loss" not in found and "last token" not in found


def test_a_long_prompt_is_shown_completely(tmp_path: Path) -> None:
    path, prompt = tmp_path / "report.html", "word " * 300 + "end"
    sample = Sample(Question(prompt, "x"), "y", "x")
    write_report(path, LOG, [], title="t", settings={}, results={}, samples=[sample])
    assert " ".join(prompt.split()) in read(path)


def test_a_run_without_a_step_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="no step was run"):
        write_report(tmp_path / "r.html", [], [], title="t", settings={}, results={})
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match="matplotlib is needed to write the report"):
        check_report()
