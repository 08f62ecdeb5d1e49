"""Files in ONNX Runtime's own format: what they compute and hold, and how they are read."""

from __future__ import annotations

import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.cli.main import main
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.exporters.onnx import ort_format, write
from qalora_compile.runtime import open_session
from qalora_compile.untrusted.artifacts import ORT_FILE
from qalora_compile.untrusted.ort_file import check_ort
from qalora_compile.verify import compare_nodes
from tests.models import MLP, adapted, assert_close, llama

CONFIGS = ("required_operators", "required_operators_and_types")


def folded(bits: int = 4) -> tuple[qc.Program, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 96)
    quant = qc.QuantSpec(bits=bits, group_size=32)
    return qc.fold_adapters(adapted(MLP(96, 33, 8).eval(), (x,), quant)), x


def operators_of(path: Path) -> set[str]:
    """The operators of a file, by ONNX Runtime's own reader."""
    found: dict[str, dict[int, set[str]]] = {}
    tools = pytest.importorskip("onnxruntime.tools.ort_format_model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        tools.OrtFormatModelProcessor(str(path), found, None).process()
    return {
        f"{domain};{version};{kind}"
        for domain, versions in found.items()
        for version, kinds in versions.items()
        for kind in kinds
    }


def operators_in(config: Path) -> set[str]:
    """The operators that a configuration of a reduced build lists."""
    rows = [row for row in config.read_text("utf-8").splitlines() if not row.startswith("#")]
    parts = [row.split(";") for row in rows]
    return {
        f"{domain};{version};{kind}"
        for domain, version, kinds in parts
        for kind in kinds.split(",")
    }


@pytest.mark.parametrize("target", ["ort", "ort-stock", "onnx"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_file_computes_what_the_program_computes(
    target: str, bits: int, tmp_path: Path
) -> None:
    program, x = folded(bits)
    path = tmp_path / "model.ort"
    report = qc.export_model(program, path, qc.ExportSpec(target=target, format="ort"))
    assert set(report.files) == {"model.ort", *(f"model.{name}.config" for name in CONFIGS)}
    assert {file.name for file in tmp_path.iterdir()} == set(report.files)
    session = open_session(path, library=False)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), program(x), relative=2e-5)
    qc.verify_equivalence(program, path, [(x,)], qc.Tolerance(max_rel=2e-5)).check()
    operators = operators_of(path)
    assert "com.microsoft;1;MatMulNBits" in operators
    assert operators_in(tmp_path / "model.required_operators.config") == operators
    typed = (tmp_path / "model.required_operators_and_types.config").read_text("utf-8")
    assert 'ReduceSum{"inputs": {"0": ["float"]}}' in typed
    assert str(tmp_path) not in typed


def test_it_replaces_only_a_file_of_this_package(tmp_path: Path) -> None:
    program, _ = folded()
    path, spec = tmp_path / "model.ort", qc.ExportSpec(format="ort", overwrite=True)
    qc.export_model(program, path, spec)
    qc.export_model(program, path, spec)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"qalora-compile", b"another-export"))
    with pytest.raises(UserInputError, match="was not written by this tool"):
        qc.export_model(program, path, spec)
    with pytest.raises(UserInputError, match=r"does not end in \.ort"):
        qc.export_model(program, tmp_path / "model.onnx", spec)


def test_an_interrupted_conversion_leaves_nothing_and_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, x = folded()
    path, spec = tmp_path / "model.ort", qc.ExportSpec(format="ort")

    def interrupted(model: Path, output: Path) -> None:
        output.write_bytes(b"half of a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "convert_to_ort", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qc.export_model(program, path, spec, resume="key")
    assert not path.exists()
    assert not list(tmp_path.glob("*.config"))
    report = qc.export_model(program, path, spec, resume="key")
    assert {file.name for file in tmp_path.iterdir()} == set(report.files)
    qc.verify_equivalence(program, path, [(x,)], qc.Tolerance(max_rel=1e-5)).check()


def test_what_has_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = folded()
    older = qc.ExportSpec(format="ort", runtime="onnxruntime==1.18")
    with pytest.raises(UnsupportedError, match=r"writes \.ort files for itself"):
        qc.export_model(program, tmp_path / "model.ort", older)
    monkeypatch.setattr(ort_format, "fits_in_one_file", lambda size: False)
    with pytest.raises(UnsupportedError, match=r"a \.ort file holds 1\.9"):
        qc.export_model(program, tmp_path / "model.ort", qc.ExportSpec(format="ort"))
    monkeypatch.undo()

    def refusing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refusing)
    with pytest.raises(UnsupportedError, match="cannot convert the model: no kernel for this"):
        qc.export_model(program, tmp_path / "model.ort", qc.ExportSpec(format="ort"))
    assert list(tmp_path.iterdir()) == []


def test_the_graph_is_not_compared(tmp_path: Path) -> None:
    program, _ = folded()
    path = tmp_path / "model.ort"
    qc.export_model(program, path, qc.ExportSpec(format="ort"))
    for compare in (qc.prove_equivalence, compare_nodes):
        with pytest.raises(UserInputError, match="the graph is optimized already"):
            compare(program, path)


@pytest.mark.slow
def test_a_folder_generates_and_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model: Any = llama()
    model.save_pretrained(tmp_path / "model")
    edge = tmp_path / "edge"
    words = ["quantize", str(tmp_path / "model"), "--out", str(edge), "--format", "ort"]
    assert main(words) == 0
    assert "stock: a .ort file" in capsys.readouterr().out
    assert (edge / ORT_FILE).is_file()
    assert json.loads((edge / "qalora.json").read_text("utf-8"))["files"] == [ORT_FILE]
    assert "transformers.js_config" not in json.loads((edge / "config.json").read_text("utf-8"))
    assert main(["bench", str(edge), "--prompts", "4", "--decode", "2", "--rounds", "1"]) == 0
    library = [*words, "--overwrite", "--with-library", sys.executable]
    assert main(library) != 0


def test_a_damaged_file_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    program, _ = folded()
    path = tmp_path / "model.ort"
    qc.export_model(program, path, qc.ExportSpec(format="ort"))
    data, found = path.read_bytes(), check_ort(path)
    assert found.nodes > 3
    codes = next(row for row in found.tensors.values() if row.kind == 2)
    assert codes.inside is not None
    assert codes.inside[1] == codes.size
    shape, other = _int64(*codes.shape), _int64(*codes.shape[:-1], 1 << 40)
    samples = {
        "is not in ONNX Runtime's own format": b"\x08\x0a\x12\x00" * 9,
        "has no size of a model": data[:8],
        "is broken": data[:16],
        "takes .* and has": data.replace(shape, other),
        "a MatMulNBits says": data.replace(_int64(96), _int64(1 << 20)),
    }
    for message, sample in samples.items():
        path.write_bytes(sample)
        with pytest.raises(UserInputError, match=message):
            open_session(path)


def _int64(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def test_changed_bytes_raise_nothing_else(tmp_path: Path) -> None:
    program, _ = folded()
    path = tmp_path / "model.ort"
    qc.export_model(program, path, qc.ExportSpec(format="ort"))
    data, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        changed = bytearray(data[: draw.choice([len(data), draw.randrange(8, len(data))])])
        for _ in range(draw.randrange(1, 9)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            check_ort(path)
        except UserInputError:
            refused += 1
    assert refused > 150
