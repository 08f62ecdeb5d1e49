"""SmolLM2-135M through every step but training, which the demo shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.capture.source import load_source
from qalora_compile.exporters.genai import CONFIG_FILE, genai_config
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.packing import unpack_codes
from qalora_compile.runtime import LanguageModel, kernel_level, open_session
from tests.models import randomize_adapters

EXAMPLES = str(Path(__file__).parents[2] / "examples")
TEXT = "The committee met on Tuesday to discuss the plans for a new railway line, and"


@pytest.mark.slow
def test_a_real_model_folds_and_runs_in_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from assets import model_path

    torch.set_num_threads(2)
    source = load_source(str(model_path()))
    original = source.capture()
    assert original.notes == ()
    program = qc.quantize_groups(original, qc.QuantSpec(bits=4, group_size=32))
    assert len(program.plan.to_quantize()) == 210
    assert program.plan["lm_head"].decision == "keep"

    # The checkpoint is itself 4-bit in groups of 32, so min-max gives its weights back.
    stored, floats = program.tensors(), original.tensors()
    site = program.plan["model.layers.7.mlp.down_proj"]
    codes = unpack_codes(stored[f"{site.path}.qweight"], 4, site.k)
    scale, offset = stored[f"{site.path}.scale"], stored[f"{site.path}.offset"]
    again = GroupAffine(codes, scale, offset, 4, 32).dequantize()
    assert float((again - floats[site.weight].detach()).abs().max()) < 1e-6

    program = randomize_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=4)), size=0.003)
    folded = qc.fold_adapters(program)
    ids = torch.tensor([source.tokenizer(TEXT).input_ids])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tolerance = qc.Tolerance(max_rel=1e-4)
    qc.verify_equivalence(program, folded, [call], tolerance).check()
    assert not qc.verify_equivalence(original, folded, [call], tolerance).passed

    path = tmp_path / "model.onnx"
    report = qc.export_model(folded, path)
    assert report.size_bytes < 200e6
    qc.verify_equivalence(folded, path, [call], tolerance).check()

    tokens = ids[0].tolist()
    deployed = list(LanguageModel(open_session(path)).generate(tokens, max_new_tokens=64))
    for token in deployed:
        sequence = torch.tensor([tokens])
        with torch.no_grad():
            logits = folded(sequence, torch.ones_like(sequence)).logits
        assert int(logits[0, -1].argmax()) == token
        tokens.append(token)
    assert len(set(deployed)) > 10, "a degenerate continuation would show nothing"

    cached = qc.add_kv_cache(folded, source.model)
    prompt = ids[0].tolist()
    described: Any = source.model.config
    config = genai_config(cached.signature, described.to_dict(), {})
    for fusion in (None, "ort"):
        edge = tmp_path / f"edge-{fusion}"
        qc.export_model(cached, edge / "model.onnx", qc.ExportSpec(fusion=fusion))
        for library in (False, True) if kernel_level() else (False,):
            model = LanguageModel(open_session(edge / "model.onnx", library=library))
            assert list(model.generate(prompt, max_new_tokens=64)) == deployed
        (edge / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
        assert _genai_tokens(edge, prompt, 64) == deployed


def _genai_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens from ONNX Runtime GenAI."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
