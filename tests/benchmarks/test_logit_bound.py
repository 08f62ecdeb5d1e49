"""The bound on the change of logits is one: no input moves them farther."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import qalora_compile as qc
from benchmarks.logit_bound import Bound, Value, bounds, main
from tests.models import HIDDEN, adapted, llama, token_ids


@pytest.mark.slow
def test_no_input_moves_the_logits_farther(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    folded = qc.fold_adapters(adapted(llama(), (token_ids(2, 16),)))
    folded.save(tmp_path / "folded")
    spec = qc.ExportSpec(target="ort-stock", fusion="none")
    qc.export_model(folded, tmp_path / "model.onnx", spec)
    changes, last, rows = bounds(tmp_path / "folded", tmp_path / "model.onnx", 0.01, 4)
    assert len(changes) == 2 and 0 < changes[0] < changes[1]
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    ids = token_ids(3, 9)
    (found,) = session.run(["logits"], {session.get_inputs()[0].name: ids.numpy()})
    with torch.no_grad():
        (wanted,) = torch.utils._pytree.tree_leaves(folded(ids))
    assert float(np.abs(found - wanted.numpy()).max()) <= rows * last.change
    assert float(np.abs(found).max()) <= rows * last.size
    assert main([str(tmp_path / "folded"), str(tmp_path / "model.onnx"), "--rms", "0.01"]) == 0
    assert "a logit: size ≤" in capsys.readouterr().out
    assert last.size == pytest.approx(HIDDEN**0.5, rel=0.5)


def test_parts_of_a_layer_move_no_farther_than_their_bounds() -> None:
    draw = np.random.default_rng(0)
    bound = Bound.__new__(Bound)
    bound._heads = 2
    for _ in range(20):
        gate, up = draw.normal(size=(2, 8))
        moved = [v + draw.normal(size=8) * 0.01 for v in (gate, up)]
        sizes = [
            max(np.linalg.norm(a), np.linalg.norm(b))
            for a, b in zip((gate, up), moved, strict=True)
        ]
        values = [
            Value(float(s), float(np.linalg.norm(a - b)))
            for s, a, b in zip(sizes, (gate, up), moved, strict=True)
        ]
        one, other = (g / (1 + np.exp(-g)) * u for g, u in ((gate, up), moved))
        stated = bound.gated(*values)
        assert np.linalg.norm(one - other) <= stated.change
        assert np.linalg.norm(one) <= stated.size
