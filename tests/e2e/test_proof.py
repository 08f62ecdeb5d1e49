"""SmolLM2-135M proved at every step: program, folded, lowered for every target, and as a file.

The file is also run and compared along the graph.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.capture.load_source import load_source
from qalora_compile.verify import check_certificate, compare_nodes, named_inputs
from tests.models import randomize_adapters
from tests.verify.planted import SPECS

EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.mark.slow
def test_every_layer_of_a_real_model_is_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from assets import model_path

    quantized = qc.quantize_groups(load_source(str(model_path())).capture())
    program = randomize_adapters(qc.insert_adapters(quantized, qc.AdapterSpec(rank=4)), size=0.003)
    folded = qc.fold_adapters(program)
    lowered = [lower(folded, SPECS[name]) for name in ("ort-stock", "onnx")]
    for before, after in [(program, folded), *((folded, after) for after in lowered)]:
        certificate = qc.prove_equivalence(before, after)
        assert certificate.proved, certificate
        assert len(certificate.sites) == 210

    folded.save(tmp_path / "folded")
    qc.export_model(folded, tmp_path / "model.onnx")
    certificate = qc.prove_equivalence(tmp_path / "folded", tmp_path / "model.onnx")
    assert certificate.passed, certificate
    assert all(site.status == "proved" and len(site.modes) == 3 for site in certificate.sites)
    behind_attention = [f"input of model.layers.{i}.self_attn.o_proj" for i in range(30)]
    assert list(certificate.sampled) == behind_attention
    certificate.write(tmp_path / "equal.json")
    assert check_certificate(tmp_path / "equal.json")[1] == []

    calls = named_inputs(folded, 1)
    tried = {name: calls[name] for name in ("random 0", "left padding")}
    report = compare_nodes(folded, tmp_path / "model.onnx", tried, levels=("all",)).check()
    sites = [row for row in report.modes[0].rows if row.kind == "site"]
    assert len(sites) >= 210
    assert {row.kind for row in report.modes[0].rows} == {"read", "node", "site", "output"}
