"""On layers of real models, each method loses no more than the one before it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qalora_compile as qc
from qalora_compile.capture.load_source import load_source
from qalora_compile.config import METHODS
from qalora_compile.passes.annotate_linears import AnnotateLinears
from qalora_compile.quantizers import get_quantizer, quantize_weight
from qalora_compile.quantizers.calibrate import collect_statistics
from qalora_compile.quantizers.report import measure_sqnr
from qalora_compile.quantizers.statistics import ActivationStatistics

EXAMPLES = str(Path(__file__).parents[2] / "examples")
Statistics = Mapping[str, ActivationStatistics]


def layers(
    program: qc.Program, calls: list[dict[str, Tensor]], names: tuple[str, ...]
) -> tuple[dict[str, Tensor], Statistics, Statistics]:
    """Weights, statistics to quantize by, and statistics of other data to judge by."""
    annotated = AnnotateLinears()(program).program
    half = len(calls) // 2
    seen, fresh = (
        collect_statistics(annotated, part, names) for part in (calls[:half], calls[half:])
    )
    tensors = annotated.tensors()
    return {name: tensors[f"{name}.weight"].detach() for name in names}, seen, fresh


def minilm() -> tuple[qc.Program, list[dict[str, Tensor]], tuple[str, ...]]:
    from assets import articles, encoder_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(encoder_path(), local_files_only=True)
    model = AutoModel.from_pretrained(encoder_path(), local_files_only=True).eval()
    model.encoder.layer = model.encoder.layer[:2]  # later layers are not looked at
    texts = [text for text, _ in articles()[:64]]
    calls = [
        dict(
            tokenizer(
                texts[i : i + 8], truncation=True, max_length=96, padding=True, return_tensors="pt"
            )
        )
        for i in range(0, 64, 8)
    ]
    calls = [{name: call[name] for name in ("input_ids", "attention_mask")} for call in calls]
    parts = ("attention.self.query", "attention.output.dense", "intermediate.dense")
    names = tuple(f"encoder.layer.1.{part}" for part in parts)
    return qc.capture_model(model, (), {k: v[:2] for k, v in calls[0].items()}), calls, names


@cache
def smollm2() -> tuple[qc.Program, list[dict[str, Tensor]], tuple[str, ...]]:
    from assets import articles, model_path

    source = load_source(str(model_path()))
    model: Any = source.model
    model.model.layers = model.model.layers[:2]  # later layers are not looked at
    model.config.num_hidden_layers = 2
    ids = source.tokenizer("\n\n".join(text for text, _ in articles()[:20])).input_ids
    rows = torch.tensor(ids[: 16 * 128]).reshape(16, 128).split(4)
    calls = [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows]
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    return source.capture(), calls, tuple(f"model.layers.1.{part}" for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize("build", [minilm, smollm2])
def test_each_method_loses_no_more_than_the_one_before(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    weights, seen, fresh = layers(*build())
    for bits, group in ((2, 64), (3, 64), (4, 128)):
        decibels: dict[tuple[str, bool], float] = {}
        for method in METHODS:
            if method == "learned":
                continue  # a layer alone is quantized as by gptq
            for refine in (False, True):
                spec = qc.QuantSpec(
                    bits=bits, group_size=group, method=method, refine_offsets=refine
                )
                each = []
                for path, weight in weights.items():
                    chosen = quantize_weight(
                        get_quantizer(method), weight, spec, path=path, statistics=seen[path]
                    )
                    each.append(measure_sqnr(weight, chosen.affine, fresh[path])[1] or 0.0)
                decibels[method, refine] = sum(each) / len(each)
        for refine in (False, True):
            assert decibels["mse", refine] > decibels["minmax", refine] + 0.2
            assert decibels["hqq", refine] > decibels["mse", refine]
            assert decibels["gptq", refine] > decibels["hqq", refine] + 1
        assert decibels["hqq", True] > decibels["hqq", False] + 0.5
        assert decibels["gptq", True] > decibels["gptq", False] - 0.05


@pytest.mark.slow
def test_learned_predicts_other_texts_better_than_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    program, calls, _ = smollm2()
    parts = [
        {name: rows[at : at + 1, :64] for name, rows in call.items()}
        for call in calls
        for at in range(4)
    ]
    found = {}
    for method in ("gptq", "learned"):
        spec = qc.QuantSpec(bits=2, group_size=64, method=method, learn_steps=8)
        found[method] = qc.quantize_groups(program, spec, calibration=parts[:8])
    lost = {}
    for method, quantized in found.items():
        total = 0.0
        with torch.no_grad():
            for call in parts[12:]:
                truth, guess = (p(**call)["logits"].log_softmax(-1) for p in (program, quantized))
                total += float((truth.exp() * (truth - guess)).sum(-1).mean())
        lost[method] = total
    assert lost["learned"] < 0.9 * lost["gptq"]
