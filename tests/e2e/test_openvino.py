"""Layers of SmolLM2-135M for OpenVINO: the folder runs in OpenVINO GenAI, with torch's tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.capture.load_source import Source, load_source
from qalora_compile.exporters.openvino.tokenizer import (
    DETOKENIZER_FILE,
    TOKENIZER_FILE,
    write_tokenizers,
)
from qalora_compile.files import write_json
from tests.clients.record import record_client
from tests.clients.speed import ROUNDS, next_to_float, recording
from tests.e2e.layers import keep_layers
from tests.models import randomize_adapters

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
genai = pytest.importorskip("openvino_genai", reason="openvino-genai is not installed")
pytest.importorskip("openvino_tokenizers", reason="openvino-tokenizers is not installed")
pytestmark = pytest.mark.slow

EXAMPLES = str(Path(__file__).parents[2] / "examples")
PROMPT = "Water boils at a lower temperature on a mountain because"
NEW_TOKENS = 24
LAYERS = 6


def test_genai_generates_the_tokens_of_torch(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        from assets import model_path

        source = load_source(str(model_path()))
    keep_layers(source.model, LAYERS)
    quantized = qc.quantize_groups(source.capture(), embeddings=qc.QuantSpec(bits=8))
    folded = qc.fold_adapters(randomize_adapters(qc.insert_adapters(quantized), 1e-3)).eval()
    cached = qc.add_kv_cache(folded, source.model, last_logits=None)
    qc.export_model(cached, tmp_path / "openvino_model.xml", qc.ExportSpec(target="openvino"))
    source.tokenizer.save_pretrained(tmp_path)
    assert write_tokenizers(tmp_path, tmp_path) == TOKENIZER_FILE
    assert (tmp_path / DETOKENIZER_FILE).is_file()
    described: Any = source.model.config
    write_json(tmp_path / "config.json", described.to_dict())

    tokens = source.tokenizer(PROMPT).input_ids
    expected = list(tokens)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            call = torch.tensor([expected])
            found = folded(input_ids=call, attention_mask=torch.ones_like(call))
            expected.append(int(found.logits[0, -1].argmax()))
    pipeline = genai.LLMPipeline(str(tmp_path), "CPU", INFERENCE_PRECISION_HINT="f32")
    config = genai.GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True, do_sample=False)
    ids = np.array([tokens])
    inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    answer = pipeline.generate(inputs, config)
    assert list(answer.tokens[0]) == expected[len(tokens) :]
    text = pipeline.generate(PROMPT, config, apply_chat_template=False)
    assert str(text).strip() == source.tokenizer.decode(expected[len(tokens) :]).strip()
    record_client(
        "OpenVINO GenAI",
        metadata.version("openvino-genai"),
        "openvino",
        "SmolLM2-135M, folded",
        f"torch's {NEW_TOKENS} tokens",
        speed=_speed(source, pipeline, tmp_path, lambda p: p.generate(inputs, config)),
    )


def _speed(source: Source, tuned: Any, edge: Path, answer: Callable[[Any], Any]) -> str:
    """Seconds of a token, next to float's in GenAI; empty where no row is recorded."""
    if not recording():
        return ""
    folder = edge / "float"
    shutil.copytree(edge, folder, ignore=shutil.ignore_patterns("openvino_model.*", "float"))
    floats = qc.add_kv_cache(source.capture(), source.model, last_logits=None)
    spec = qc.ExportSpec(target="openvino", allow_unfolded=True)
    qc.export_model(floats, folder / "openvino_model.xml", spec)
    plain = genai.LLMPipeline(str(folder), "CPU", INFERENCE_PRECISION_HINT="f32")
    both = (tuned, plain)
    return next_to_float(
        [[answer(p).perf_metrics.get_tpot().mean for p in both] for _ in range(ROUNDS)]
    )
