"""Methods on the command line: calibration data, the table of what was lost, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch

from qalora_compile.cli.main import main
from qalora_compile.cli.quantized import print_reports
from qalora_compile.quantizers.report import QuantReport
from qalora_compile.runtime.session import open_session
from qalora_compile.untrusted.artifacts import model_file
from tests.capture.checkpoints.models import linears, write_folder
from tests.capture.checkpoints.test_gptq import gptq_config, gptq_layer
from tests.models import assert_close, llama, slow, token_ids

Capture = pytest.CaptureFixture[str]


def report(path: str, **values: object) -> QuantReport:
    given = {"method": "gptq", "bits": 3, "group_size": 32, "weights": 64, "weight_sqnr_db": 12.0}
    more = {"output_sqnr_db": 20.0, "rows": 9, "seconds": 1.5} | values
    return QuantReport(path=path, **(given | more))  # type: ignore[arg-type]


def test_layers_that_are_alike_share_a_row(capsys: Capture) -> None:
    reports = [report(f"layers.{i}.fc", output_sqnr_db=20.0 - i) for i in range(4)]
    reports += [report("head", notes=("damping raised to 0.5",), weight_sqnr_db=float("inf"))]
    print_reports(reports)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(lines) == 2
    assert [cell.strip() for cell in lines[0].split("│")][1:-1] == [
        *("layers.{0..3}.fc", "4", "12.0", "18.5", "17.0", "6.0", "")
    ]
    assert "exact" in lines[1] and "damping raised to 0.5" in lines[1]


def test_numbers_in_notes_do_not_part_layers(capsys: Capture) -> None:
    print_reports([report(f"a.{i}", notes=(f"damping raised to 0.{i}",)) for i in (1, 2)])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("│")]
    assert "e.g. damping raised to 0.1" in line


@pytest.mark.slow
def test_finetune_calibrates(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["finetune", str(model_folder), "--data", str(data_file), "--steps", "0"]
    words += ["--method", "gptq", "--bits", "3", "--calibration", str(data_file)]
    assert main([*words, "--calibration-samples", "4", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.{0..1}.mlp.down_proj" in printed
    assert "damping" in printed, "four examples are few rows"
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert record["quant"]["method"] == "gptq"
    assert main([*words, "--calibration-samples", "0", "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_quantize_refuses_what_it_cannot_calibrate(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = str(tmp_path / "edge")
    assert main(["quantize", str(model_folder), "--method", "gptq", "--out", out]) == 2
    printed = capsys.readouterr().err
    assert "needs calibration data" in printed and "quantize --calibration FILE" in printed
    assert not (tmp_path / "edge").exists()


def texts(path: Path, word: str, count: int = 12) -> Path:
    rows = ({"text": f"{word} {at} " * (3 + at % 4)} for at in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.slow
def test_quantize_learns_from_files_in_turn(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    files = [str(texts(tmp_path / f"{word}.jsonl", word, 40)) for word in ("one", "two")]
    words = ["quantize", str(model_folder), "--bits", "3", "--calibration", *files]
    words += ["--out", str(tmp_path / "edge"), "--no-kv-cache", "--embeddings", "float"]
    assert main([*words, "--method", "learned", "--learn-steps", "2"]) == 0
    printed = capsys.readouterr()
    assert "method learned" in printed.out and "before scales and offsets" in printed.out
    assert "nats a token from the float model" in printed.err
    record = json.loads((tmp_path / "edge" / "qalora.json").read_text("utf-8"))
    assert record["quant"]["learn_steps"] == 2
    assert not list(tmp_path.glob(".*learned*")), "the work is removed with the result complete"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--method", "learned", "--calibration-samples", "2"], "8 calibration texts or more"),
        (["--method", "gptq", "--learn-steps", "5"], "--learn-steps and --learn-rate are for"),
        (["--method", "learned", "--learn-rate", "0"], "--learn-rate is 0.0"),
    ],
)
def test_quantize_refuses_to_learn_before_anything_is_written(
    more: list[str], problem: str, model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    data, out = texts(tmp_path / "a.jsonl", "a"), tmp_path / "edge"
    words = ["quantize", str(model_folder), "--calibration", str(data), "--out", str(out)]
    assert main([*words, *more]) == 2
    assert problem in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*learned*"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["minmax", "hqq"])
def test_quantize_reports_what_was_lost(
    method: str, model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = str(tmp_path / "edge")
    assert main(["quantize", str(model_folder), "--method", method, "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "not measured" in printed and f"(method {method}, bits 4, group 32)" in printed
    assert "model.layers.{0..1}.mlp.down_proj" in printed


@pytest.mark.parametrize("act_order", [False, *slow(True)])
def test_quantize_keeps_the_codes_of_a_checkpoint(
    act_order: bool, tmp_path: Path, capsys: Capture
) -> None:
    """The edge model computes what the float model of its GPTQ weights does, by transformers."""
    wanted: list[torch.Tensor] = []
    folder, edge = tmp_path / "gptq", tmp_path / "edge"
    layer = gptq_layer(wanted, 3, act_order=act_order)
    state = write_folder(folder, layer, gptq_config(3, desc_act=act_order))
    assert main(["quantize", str(folder), "--out", str(edge), "--all-logits"]) == 0
    assert "in memory" in capsys.readouterr().err
    model = llama()
    names = [name for name, _ in linears(model)]
    weights = {f"{n}.weight": w for n, w in zip(names, wanted, strict=True)}
    model.load_state_dict(state | weights)
    session, ids = open_session(model_file(edge), library=False, exact=True), token_ids(2, 9)
    ones = torch.ones_like(ids)
    feed = {"input_ids": ids.numpy(), "attention_mask": ones.numpy()}
    for value in session.get_inputs():
        if value.name == "position_ids":
            feed[value.name] = (ones.cumsum(1) - 1).numpy()
        elif value.name not in feed:
            shape = [
                2 if i == 0 else s if isinstance(s, int) else 0 for i, s in enumerate(value.shape)
            ]
            feed[value.name] = numpy.zeros(shape, numpy.float32)
    logits = torch.from_numpy(session.run(["logits"], feed)[0])
    with torch.no_grad():
        assert_close(logits, model(ids).logits, relative=1e-5)
    record = json.loads((edge / "qalora.json").read_text("utf-8"))
    assert record["layers"]["by_width"] == {"3 bits": 14}


@pytest.mark.slow
def test_quantize_anew_where_bits_are_asked_for(tmp_path: Path, capsys: Capture) -> None:
    folder, edge = tmp_path / "gptq", tmp_path / "edge"
    write_folder(folder, gptq_layer([], 3), gptq_config(3))
    assert main(["quantize", str(folder), "--out", str(edge), "--bits", "4"]) == 0
    assert "requantized" in capsys.readouterr().err
    record = json.loads((edge / "qalora.json").read_text("utf-8"))
    assert record["layers"]["by_width"] == {"4 bits": 14}


def test_quantize_refuses_what_no_float_checkpoint_says(
    model_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["quantize", str(model_folder), "--out", str(tmp_path / "edge")]
    assert main([*words, "--stored-zero-points", "v2"]) == 2
    assert "this one is not" in capsys.readouterr().err
    assert not (tmp_path / "edge").exists()
