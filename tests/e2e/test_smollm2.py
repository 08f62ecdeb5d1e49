"""SmolLM2-135M through every step but training, which the demo shows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.capture.load_source import load_source
from qalora_compile.exporters.onnx.genai_config import CONFIG_FILE, genai_config
from qalora_compile.files import write_json
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.runtime import LanguageModel, kernel_level, library_path, open_session
from tests.models import randomize_adapters

EXAMPLES = str(Path(__file__).parents[2] / "examples")
PROMPTS = (
    "The committee met on Tuesday to discuss the plans for a new railway line, and",
    "Shares in the oil company fell sharply after",
    "Once upon a time, in a village by the sea,",
    "The capital of France is",
    "def fibonacci(n):",
    "To bake bread you need flour, water, salt and",
    "The striker scored twice in the second half before",
    "Water boils at a lower temperature on a mountain because",
    "Dear Sir or Madam,",
    "1, 2, 3, 4,",
)
NEW_TOKENS = 64
NEVER_GENERATED = 16
"""A special token of the tokenizer that no text has: generation does not end at it."""


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
    ids = torch.tensor([source.tokenizer(PROMPTS[0]).input_ids])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tolerance = qc.Tolerance(max_rel=1e-4)
    qc.verify_equivalence(program, folded, [call], tolerance).check()
    assert not qc.verify_equivalence(original, folded, [call], tolerance).passed

    path = tmp_path / "model.onnx"
    report = qc.export_model(folded, path)
    assert report.size_bytes < 200e6
    qc.verify_equivalence(folded, path, [call], tolerance).check()

    cached = qc.add_kv_cache(folded, source.model)
    described: Any = source.model.config
    modes: list[Callable[[list[int]], list[int]]] = []
    for fusion in ("ort", "standard"):
        edge = tmp_path / fusion
        qc.export_model(cached, edge / "model.onnx", qc.ExportSpec(fusion=fusion))
        modes += _deployments(edge, cached, described.to_dict())
    for number, text in enumerate(PROMPTS):
        prompt = source.tokenizer(text).input_ids
        # All ways take long; `modes` ends with the two that have the library, if there is one.
        tokens = [generate(prompt) for generate in (modes if number < 2 else modes[-2:])]
        assert len(set(tokens[0])) > 10, "a degenerate continuation would show nothing"
        assert _choices(folded, prompt, tokens[0]) == tokens[0], text
        assert all(found == tokens[0] for found in tokens), text


def _deployments(
    edge: Path, cached: qc.Program, description: dict[str, Any]
) -> Iterator[Callable[[list[int]], list[int]]]:
    """Greedy generation: ONNX Runtime and GenAI, on stock kernels and with the library."""
    genai = pytest.importorskip("onnxruntime_genai")
    for library in (None, library_path()) if kernel_level() else (None,):
        if library is not None:
            shutil.copy2(library, edge / library.name)
        model = LanguageModel(open_session(edge / "model.onnx", library=library is not None))
        yield partial(_tokens, model)
        config = genai_config(
            cached.signature,
            description,
            {"eos_token_id": NEVER_GENERATED},
            library=None if library is None else library.name,
        )
        write_json(edge / CONFIG_FILE, config)
        yield partial(_genai_tokens, genai, genai.Model(str(edge)))


def _tokens(model: LanguageModel, prompt: list[int]) -> list[int]:
    return list(model.generate(prompt, max_new_tokens=NEW_TOKENS))


def _choices(folded: qc.Program, prompt: list[int], tokens: list[int]) -> list[int]:
    """What torch, given the prompt and the tokens before it, takes for each token: greedily."""
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logits = folded(ids, torch.ones_like(ids)).logits
    return [int(token) for token in logits[0, len(prompt) - 1 : -1].argmax(-1)]


def _genai_tokens(genai: Any, model: Any, prompt: list[int]) -> list[int]:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + NEW_TOKENS, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
