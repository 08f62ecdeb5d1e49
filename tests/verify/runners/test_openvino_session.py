"""OpenVINO models are run, compared along the graph and proved like ONNX models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import UserInputError
from qalora_compile.verify import compare_nodes, named_inputs
from qalora_compile.verify.runners.openvino_session import OpenvinoSession
from tests.exporters.test_kv_cache import fold
from tests.models import (
    MLP,
    adapted,
    assert_close,
    bert,
    llama,
    randomize_adapters,
    token_ids,
)

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
TIGHT = qc.Tolerance(max_rel=1e-5)


def exported(program: qc.Program, folder: Path, **options: Any) -> Path:
    path = folder / "model.xml"
    qc.export_model(program, path, qc.ExportSpec(target="openvino", **options))
    return path


def folded_mlp(group: int = 16) -> qc.Program:
    quant = qc.QuantSpec(bits=3, group_size=group)
    return qc.fold_adapters(adapted(MLP(50, 64, 10).eval(), (torch.randn(4, 50),), quant))


def changed(path: Path, folder: Path, name: str, change: float) -> Path:
    """A copy of a model in which one constant differs."""
    model = openvino.Core().read_model(str(path))
    node = next(n for n in model.get_ops() if n.get_friendly_name() == name)
    values = node.data.copy()
    values.reshape(-1)[0] += change
    made = openvino.opset13.constant(values)
    made.set_friendly_name(name)
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(made.output(0))
    openvino.save_model(model, str(folder / "changed.xml"), compress_to_fp16=False)
    return folder / "changed.xml"


def test_sites_and_outputs_are_compared(tmp_path: Path) -> None:
    program = folded_mlp()
    path, x = exported(program, tmp_path), torch.randn(3, 50)
    report = qc.verify_equivalence(program, path, [(x,)], TIGHT)
    assert report.passed
    assert [row.name for row in report.sites] == [site.name for site in program.plan]
    wrong = changed(path, tmp_path, "layers.1.zero_point", 1.0)
    found = qc.verify_equivalence(program, wrong, [(x,)], TIGHT)
    assert not found.passed
    assert found.first_divergence == "layers.1"


def test_every_value_is_within_its_bound(tmp_path: Path) -> None:
    program = qc.fold_adapters(adapted(bert(), (token_ids(2, 16),))).eval()
    report = compare_nodes(program, exported(program, tmp_path), named_inputs(program, 1))
    assert report.passed, str(report)
    (mode,) = report.modes
    assert mode.name == "OpenVINO's CPU plugin, float32"
    kinds = {row.kind for row in mode.rows}
    assert {"site", "output"} <= kinds


def test_every_coefficient_is_proved(tmp_path: Path) -> None:
    program = folded_mlp()
    path = exported(program, tmp_path)
    certificate = qc.prove_equivalence(program, path)
    assert certificate.check(allow_sampled=True).verdict == "SAMPLED"
    assert [site.status for site in certificate.sites] == ["proved"] * 2
    wrong = changed(path, tmp_path, "layers.0.zero_point", 1e-3)
    assert qc.prove_equivalence(program, wrong).verdict == "DIFFERENT"


@pytest.mark.parametrize("stateful", [True, False])
def test_a_cache_is_given_and_returned_by_name(stateful: bool, tmp_path: Path) -> None:
    model, folded = fold(llama)
    cached = qc.add_kv_cache(folded, model)
    session = OpenvinoSession(exported(cached, tmp_path, stateful=stateful))
    ids = token_ids(2, 7).numpy()
    past = {leaf.name: np.zeros((2, 2, 0, 16), np.float32) for leaf in cached.signature.cache}

    def step(begin: int, stop: int, past: dict[str, Any]) -> dict[str, Any]:
        given = {
            "input_ids": ids[:, begin:stop],
            "attention_mask": np.ones((2, stop), np.int64),
            "position_ids": np.arange(begin, stop)[None].repeat(2, 0),
        }
        return session.outputs(given | past)

    first = step(0, 4, past)
    assert first["present.1.value"].shape == (2, 2, 4, 16)
    later = {n.replace("present.", "past_key_values."): v.numpy() for n, v in first.items()}
    step(0, 7, past)  # another sequence in between
    with torch.no_grad():
        expected = folded(torch.from_numpy(ids)).logits[:, 4:]
    assert_close(step(4, 7, later)["logits"], expected, relative=1e-5)


@pytest.mark.parametrize("stateful", [True, False])
def test_a_language_model_is_compared_on_complete_sequences(stateful: bool, tmp_path: Path) -> None:
    model, ids = llama(), token_ids(2, 16)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = qc.quantize_groups(qc.capture_model(model, (), call))
    folded = qc.fold_adapters(randomize_adapters(qc.insert_adapters(program)))
    path = exported(qc.add_kv_cache(folded, model, last_logits=None), tmp_path, stateful=stateful)
    ids, mask = ids[:, :9], torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0  # rows that hide every key
    calls = [{"input_ids": ids, "attention_mask": each} for each in (torch.ones_like(mask), mask)]
    report = qc.verify_equivalence(folded, path, calls, qc.Tolerance(max_rel=1e-4))
    assert report.passed, str(report)


def test_files_that_are_not_ours_or_damaged_are_refused(tmp_path: Path) -> None:
    path = exported(folded_mlp(), tmp_path)
    other = tmp_path / "other.xml"
    op = openvino.opset13
    x = op.parameter([2], openvino.Type.f32, name="x")
    openvino.save_model(openvino.Model([op.abs(x)], [x], "theirs"), str(other))
    with pytest.raises(UserInputError, match="was not exported by this package"):
        OpenvinoSession(other)
    lost = tmp_path / "lost.xml"
    shutil.copy(path, lost)
    with pytest.raises(UserInputError, match=r"lost\.bin"):
        OpenvinoSession(lost)
    lost.with_suffix(".bin").write_bytes(b"short")
    with pytest.raises(UserInputError, match="OpenVINO cannot read"):
        OpenvinoSession(lost)
    (tmp_path / "text.xml").write_text("not a model", "utf-8")
    (tmp_path / "text.bin").touch()
    with pytest.raises(UserInputError, match="is not an OpenVINO model"):
        OpenvinoSession(tmp_path / "text.xml")
