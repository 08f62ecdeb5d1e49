"""Certificates: written, read, and checked again in a process that has no torch."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

import qalora_compile as qc
from qalora_compile.errors import UserInputError, VerificationError
from qalora_compile.verify import Certificate, check_certificate
from qalora_compile.verify.proof.recheck import recheck
from tests.models import MLP, adapted
from tests.verify.planted import program

WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnxruntime", "safetensors"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from qalora_compile.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def without_torch(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process that cannot import torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """A folded program, its export and the certificate of both."""
    root = tmp_path_factory.mktemp("stored")
    program("folded").save(root / "folded")
    shutil.copy(models / "ort.onnx", root / "model.onnx")
    qc.prove_equivalence(root / "folded", root / "model.onnx").write(root / "equal.json")
    return root


@pytest.fixture
def copy(stored: Path, tmp_path: Path) -> Path:
    """The same elsewhere: a certificate finds files in its own folder."""
    root = tmp_path / "copy"
    shutil.copytree(stored, root)
    value = json.loads((root / "equal.json").read_text("utf-8"))
    for side, name in (("reference", "folded"), ("candidate", "model.onnx")):
        value[side]["path"] = f"elsewhere/{name}"
    (root / "equal.json").write_text(json.dumps(value), "utf-8")
    return root


def test_a_certificate_reads_as_it_was_written(stored: Path, tmp_path: Path) -> None:
    certificate = qc.prove_equivalence(stored / "folded", stored / "model.onnx")
    certificate.write(tmp_path / "c.json")
    assert Certificate.read(tmp_path / "c.json") == certificate
    value = json.loads((tmp_path / "c.json").read_text("utf-8"))
    assert value["verdict"] == "PROVED"
    assert value["conditions"] == []
    assert value["proved"] is True
    assert value["sampled"] == []
    assert set(value["reference"]["files"]) == {"program.json", "quantized.safetensors"}
    assert all(len(digest) == 64 for digest in value["candidate"]["files"].values())
    assert "codes, scales and biases have no tolerance" in value["tolerance"]
    row = value["sites"][0]["modes"]["operators"]
    assert 0 < row["max_abs"] <= row["frobenius"]
    assert 0 < row["max_ratio"] <= 1
    assert row["float32"] > 0


def test_it_is_checked_again_without_torch(copy: Path) -> None:
    done = without_torch("verify", "--certificate", str(copy / "equal.json"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["problems"] == []


def test_a_changed_weight_is_found_without_torch(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    proto = next(t for t in model.graph.initializer if t.name == "up.zero_point")
    values = numpy_helper.to_array(proto).copy()
    values[3, 1] += 1
    proto.CopyFrom(numpy_helper.from_array(values, proto.name))
    onnx.save(model, copy / "model.onnx")
    done = without_torch("verify", "--certificate", str(copy / "equal.json"), "--json")
    assert done.returncode == 1, done.stderr
    problems = json.loads(done.stdout)["problems"]
    assert any("model.onnx: the file has changed" in p for p in problems)
    assert any(p.startswith("the two are different: up: weights differ") for p in problems)
    assert any(p.startswith("up: the largest difference is") for p in problems)


def test_a_file_that_changed_without_meaning_is_said(copy: Path) -> None:
    path = copy / "folded" / "program.json"
    path.write_text(path.read_text("utf-8") + "\n", "utf-8")
    certificate, problems = check_certificate(copy / "equal.json")
    assert certificate.proved
    assert problems == [f"{path}: the file has changed"]


def test_a_certificate_cannot_say_more_than_is_so(copy: Path) -> None:
    value = json.loads((copy / "equal.json").read_text("utf-8"))
    value["sites"][0]["modes"]["operators"]["max_abs"] = 0.0
    for mode in value["sites"][0]["modes"].values():
        mode["max_abs"] = 0.0
    del value["segments"][0]
    (copy / "equal.json").write_text(json.dumps(value), "utf-8")
    _, problems = check_certificate(copy / "equal.json")
    assert any(p.startswith("q: the largest difference is") for p in problems)
    assert "input of q: in only one of the two" in problems


def test_what_says_that_it_differs_does_not_hold(stored: Path, tmp_path: Path) -> None:
    program("quantized").save(tmp_path / "quantized")
    certificate = qc.prove_equivalence(tmp_path / "quantized", stored / "model.onnx")
    assert certificate.verdict == "DIFFERENT"
    certificate.write(tmp_path / "c.json")
    _, problems = check_certificate(tmp_path / "c.json")
    assert problems[0] == "the certificate itself states DIFFERENT"


def test_what_was_in_memory_cannot_be_checked_again(stored: Path, tmp_path: Path) -> None:
    certificate = qc.prove_equivalence(program("folded"), stored / "model.onnx")
    assert len(certificate.reference.tensors or "") == 64
    certificate.write(tmp_path / "c.json")
    with pytest.raises(UserInputError, match="in memory"):
        check_certificate(tmp_path / "c.json")
    kept = qc.prove_equivalence(program("folded"), stored / "model.onnx", folder=stored / "folded")
    kept.write(tmp_path / "c.json")
    assert check_certificate(tmp_path / "c.json")[1] == []
    other = qc.prove_equivalence(program("folded"), stored / "model.onnx", folder=_other(tmp_path))
    assert other.reference.path is None, "its tensors are not those of the folder"


def _other(root: Path) -> Path:
    program("quantized").save(root / "other")
    return root / "other"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{}", "not a certificate"),
        ('{"format": "qalora-certificate", "version": 9}', "version 9"),
        ('{"format": "qalora-certificate", "version": 1}', "malformed"),
        ("not json", "not valid JSON"),
    ],
)
def test_a_broken_certificate_is_refused(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text, "utf-8")
    with pytest.raises(UserInputError, match=what):
        check_certificate(tmp_path / "c.json")


def test_what_it_was_made_for_may_be_gone(copy: Path) -> None:
    (copy / "model.onnx").unlink()
    with pytest.raises(UserInputError, match="is missing"):
        check_certificate(copy / "equal.json")


def test_a_half_precision_model_is_proved_from_its_files(tmp_path: Path) -> None:
    x = torch.randn(2, 64).bfloat16()
    folded = qc.fold_adapters(adapted(MLP(64, 32, 8).bfloat16(), (x,)))
    folded.save(tmp_path / "folded")
    qc.export_model(folded, tmp_path / "model.onnx", qc.ExportSpec(target="ort-stock"))
    certificate = qc.prove_equivalence(tmp_path / "folded", tmp_path / "model.onnx")
    assert certificate.proved, certificate
    assert any("widened" in note for note in certificate.notes)


def _edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value), "utf-8")


@pytest.mark.parametrize(
    "field", ["max_abs", "max_ratio", "frobenius", "operator", "float32", "weight_max", "coarse"]
)
def test_every_bound_is_compared(field: str, copy: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["sites"][0]["modes"]["operators"][field] = 0.0

    _edited(copy / "equal.json", change)
    _, problems = check_certificate(copy / "equal.json")
    assert len(problems) == 1
    assert problems[0].startswith("q: ")
    assert problems[0].endswith("stated as 0")


def test_a_certificate_cannot_claim_a_stronger_verdict(copy: Path) -> None:
    """What was left undecided is so still, whatever the certificate says."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Softplus(), torch.nn.Linear(64, 8))
    quantized = qc.quantize_groups(qc.capture_model(model.eval(), (torch.randn(2, 64),)))
    quantized.save(copy / "quantized")
    qc.export_model(quantized, copy / "other.onnx", qc.ExportSpec(target="ort-stock"))
    found = qc.prove_equivalence(copy / "quantized", copy / "other.onnx", samples=0)
    assert found.verdict == "UNDECIDED"
    found.write(copy / "c.json")
    _edited(copy / "c.json", lambda value: value.update(verdict="PROVED"))
    with pytest.raises(UserInputError, match="states proved for a part"):
        check_certificate(copy / "c.json")
    _edited(copy / "c.json", lambda value: value.update(verdict="SAMPLED"))
    certificate, problems = check_certificate(copy / "c.json")
    assert certificate.verdict == "UNDECIDED"
    assert problems[0].startswith("stated as SAMPLED, but is UNDECIDED")

    def sampled(value: dict[str, Any]) -> None:
        for row in value["segments"]:
            if row["status"] == "open":
                row.update(status="sampled", sampled=1.0)

    _edited(copy / "c.json", sampled)
    assert check_certificate(copy / "c.json")[0].verdict == "UNDECIDED", "beyond the tolerance"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_the_verdict_of_an_older_certificate_is_read_by_today_s_words(
    version: int, copy: Path
) -> None:
    """Versions before 4 say EQUAL, of parts that were only tried on samples too."""

    def older(value: dict[str, Any]) -> None:
        value.update(version=version, verdict="EQUAL")
        del value["conditions"]
        for row in value["segments"]:
            del row["conditions"]

    _edited(copy / "equal.json", older)
    assert Certificate.read(copy / "equal.json").verdict == "PROVED"

    def sampled(value: dict[str, Any]) -> None:
        value.update(proved=False)
        value["segments"][0].update(status="sampled", sampled=1e-7)

    _edited(copy / "equal.json", sampled)
    read = Certificate.read(copy / "equal.json")
    assert (read.verdict, read.passed) == ("SAMPLED", False)
    with pytest.raises(VerificationError, match="only tried on samples"):
        read.check()
    assert read.check(allow_sampled=True) is read


def test_a_condition_that_is_not_stated_is_a_deviation(copy: Path) -> None:
    def conditional(value: dict[str, Any]) -> None:
        value.update(verdict="PROVED UNDER")
        value["segments"][0]["conditions"] = ["n ≥ 1"]

    _edited(copy / "equal.json", conditional)
    stated = Certificate.read(copy / "equal.json")
    assert (stated.verdict, stated.conditions, stated.passed) == ("PROVED UNDER", ("n ≥ 1",), True)
    assert check_certificate(copy / "equal.json")[1] == [], "it needs none of them"
    proved = dataclasses.replace(stated, segments=())
    assert recheck(proved, stated)[-1] == "a condition that is not stated: n ≥ 1"


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(samples={}),
        lambda value: value.update(verdict="FINE"),
        lambda value: value["sites"][0]["modes"]["operators"].update(max_abs=None),
        lambda value: value["reference"].update(files=3),
    ],
)
def test_a_malformed_field_is_our_error(
    change: Callable[[dict[str, Any]], None], copy: Path
) -> None:
    _edited(copy / "equal.json", change)
    with pytest.raises(UserInputError, match="malformed"):
        check_certificate(copy / "equal.json")


def test_a_certificate_cannot_say_proved_of_what_is_not(copy: Path) -> None:
    _edited(copy / "equal.json", lambda value: value["segments"][0].update(status="sampled"))
    with pytest.raises(UserInputError, match="states proved for a part"):
        check_certificate(copy / "equal.json")
