"""SmolLM2-135M through every step but training, which the demo shows.

One road, walked once: every test looks at a part of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.api import lower
from qalora_compile.capture.load_source import Source, load_source
from qalora_compile.capture.transformers_internals import gguf_read_once
from qalora_compile.exporters.onnx.genai_config import CONFIG_FILE, genai_config
from qalora_compile.files import write_json
from qalora_compile.files.marks import GGUF_KEY
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.packing.bitstream import unpack_codes
from qalora_compile.runtime import LanguageModel, kernel_level, library_path, open_session
from qalora_compile.verify import check_certificate, compare_nodes, named_inputs
from tests.clients.record import record_client
from tests.clients.speed import FLOAT, in_turns, recording
from tests.e2e.layers import first_layers
from tests.models import randomize_adapters, scale_of, worst
from tests.verify.planted import SPECS

EXAMPLES = str(Path(__file__).parents[2] / "examples")
PROMPTS = (
    "The committee met on Tuesday to discuss the plans for a new railway line, and",
    "def fibonacci(n):",
    "Water boils at a lower temperature on a mountain because",
    "1, 2, 3, 4,",
)
IN_EVERY_MODE = 1
"""Prompts that all execution modes are given; the others are for those that come last."""
NEW_TOKENS, TIMED_TOKENS = 40, 16
Generate = Callable[[list[int]], Iterator[int]]
NEVER_GENERATED = 16
"""A special token of the tokenizer that no text has: generation does not end at it."""
TOLERANCE = qc.Tolerance(max_rel=1e-4)
BLOCK_BYTES = 20
FEW = 4
"""Layers of which every value is compared."""

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Road:
    """The model at each stage, and its ONNX file without a cache."""

    base: Path
    source: Source
    original: qc.Program
    quantized: qc.Program
    adapted: qc.Program
    folded: qc.Program
    exported: Path

    def call(self, text: str) -> dict[str, torch.Tensor]:
        """The inputs for a text."""
        ids = torch.tensor([self.source.tokenizer(text).input_ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """Walk it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        from assets import model_path

        base = model_path()
    source = load_source(str(base))
    original = source.capture()
    quantized = qc.quantize_groups(original, qc.QuantSpec(bits=4, group_size=32))
    adapted = _adapted(quantized)
    folded = qc.fold_adapters(adapted)
    exported = tmp_path_factory.mktemp("smollm2") / "model.onnx"
    assert qc.export_model(folded, exported).size_bytes < 200e6
    return Road(base, source, original, quantized, adapted, folded, exported)


def _adapted(quantized: qc.Program) -> qc.Program:
    return randomize_adapters(qc.insert_adapters(quantized, qc.AdapterSpec(rank=4)), size=0.003)


def test_every_layer_is_quantized_without_loss(road: Road) -> None:
    """The checkpoint is itself 4-bit in groups of 32, so min-max gives its weights back."""
    assert road.original.notes == ()
    assert len(road.quantized.plan.to_quantize()) == 210
    assert road.quantized.plan["lm_head"].decision == "keep"
    stored, floats = road.quantized.tensors(), road.original.tensors()
    site = road.quantized.plan["model.layers.7.mlp.down_proj"]
    codes = unpack_codes(stored[f"{site.path}.qweight"], 4, site.k)
    scale, offset = stored[f"{site.path}.scale"], stored[f"{site.path}.offset"]
    again = GroupAffine(codes, scale, offset, 4, 32).dequantize()
    assert float((again - floats[site.weight].detach()).abs().max()) < 1e-6


def test_folded_and_exported_models_compute_the_same(road: Road) -> None:
    calls = [road.call(PROMPTS[0])]
    qc.verify_equivalence(road.adapted, road.folded, calls, TOLERANCE).check()
    assert not qc.verify_equivalence(road.original, road.folded, calls, TOLERANCE).passed
    qc.verify_equivalence(road.folded, road.exported, calls, TOLERANCE).check()


def test_every_deployment_generates_the_same_tokens(road: Road, tmp_path: Path) -> None:
    cached = qc.add_kv_cache(road.folded, road.source.model)
    described: Any = road.source.model.config
    modes: list[Generate] = []
    for fusion in ("ort", "standard"):
        edge = tmp_path / fusion
        qc.export_model(cached, edge / "model.onnx", qc.ExportSpec(fusion=fusion))
        modes += _deployments(edge, cached, described.to_dict())
    for number, text in enumerate(PROMPTS):
        prompt = road.source.tokenizer(text).input_ids
        # `modes` ends with the two that have the library, if there is one
        chosen = modes[0 if number < IN_EVERY_MODE else -2 :]
        tokens = [list(generate(prompt)) for generate in chosen]
        assert len(set(tokens[0])) > 10, "a degenerate continuation would show nothing"
        assert _choices(road.folded, prompt, tokens[0]) == tokens[0], text
        assert all(found == tokens[0] for found in tokens), text
    half = len(modes) // 2
    speeds = _speeds(road, modes[half - 2 : half], tmp_path / "float")
    for client, speed in zip(("onnxruntime", "onnxruntime-genai"), speeds, strict=True):
        result = f"torch's {NEW_TOKENS} tokens on {len(PROMPTS)} prompts, on either kernels"
        version = metadata.version(client)
        record_client(client, version, "ort", "SmolLM2-135M, folded", result, speed=speed)


def _speeds(road: Road, fusion_ort: list[Generate], folder: Path) -> list[str]:
    """Decoding of both clients with the library, if there is one, next to float in them."""
    if not recording():
        return [""] * len(fusion_ort)
    floats = qc.add_kv_cache(road.original, road.source.model)
    qc.export_model(floats, folder / "model.onnx", FLOAT)
    described: Any = road.source.model.config
    base = list(_deployments(folder, floats, described.to_dict()))[-2:]
    prompt = road.source.tokenizer(PROMPTS[0]).input_ids
    return [
        in_turns(partial(tuned, prompt), partial(plain, prompt), TIMED_TOKENS)
        for tuned, plain in zip(fusion_ort, base, strict=True)
    ]


def _deployments(edge: Path, cached: qc.Program, description: dict[str, Any]) -> Iterator[Generate]:
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


def _tokens(model: LanguageModel, prompt: list[int]) -> Iterator[int]:
    return model.generate(prompt, max_new_tokens=NEW_TOKENS)


def _choices(folded: qc.Program, prompt: list[int], tokens: list[int]) -> list[int]:
    """What torch, given the prompt and the tokens before it, takes for each token: greedily."""
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logits = folded(ids, torch.ones_like(ids)).logits
    return [int(token) for token in logits[0, len(prompt) - 1 : -1].argmax(-1)]


def _genai_tokens(genai: Any, model: Any, prompt: list[int]) -> Iterator[int]:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + NEW_TOKENS, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_sequence(0)[-1])


def test_every_layer_is_proved(road: Road, tmp_path: Path) -> None:
    """At every step: program, folded, lowered for every target, and as a file."""
    lowered = [lower(road.folded, SPECS[name]) for name in ("ort-stock", "onnx")]
    pairs = [(road.adapted, road.folded), *((road.folded, after) for after in lowered)]
    for before, after in pairs:
        certificate = qc.prove_equivalence(before, after)
        assert certificate.proved, certificate
        assert len(certificate.sites) == 210

    road.folded.save(tmp_path / "folded")
    certificate = qc.prove_equivalence(tmp_path / "folded", road.exported)
    certificate.check(allow_sampled=True)
    assert all(site.status == "proved" and len(site.modes) == 3 for site in certificate.sites)
    behind_attention = {f"input of model.layers.{i}.self_attn.o_proj" for i in range(30)}
    assert set(certificate.sampled) <= behind_attention
    certificate.write(tmp_path / "equal.json")
    assert check_certificate(tmp_path / "equal.json")[1] == []


def test_every_value_along_the_graph_is_that_of_the_program(road: Road, tmp_path: Path) -> None:
    """Of the first layers: later ones have the same nodes, and their outputs are compared above."""
    first = replace(road.source, model=first_layers(road.source.model, FEW)).capture()
    quantized = qc.quantize_groups(first, qc.QuantSpec(bits=4, group_size=32))
    folded = qc.fold_adapters(_adapted(quantized))
    qc.export_model(folded, tmp_path / "model.onnx")
    tried = {"left padding": named_inputs(folded, 1)["left padding"]}
    report = compare_nodes(folded, tmp_path / "model.onnx", tried, levels=("all",)).check()
    sites = [row for row in report.modes[0].rows if row.kind == "site"]
    assert len(sites) >= 7 * FEW
    assert {row.kind for row in report.modes[0].rows} == {"read", "node", "site", "output"}


def test_it_goes_from_gguf_to_gguf(road: Road, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    program = qc.quantize_groups(road.original, stored=road.source.stored()[0])
    folded = qc.fold_adapters(_adapted(program))
    report = qc.export_model(folded, path, qc.ExportSpec(target="gguf"), model=road.base)
    assert max(row.relative_error for row in report.stored) < 1e-3

    first, second = gguf.GGUFReader(str(road.base)), gguf.GGUFReader(str(path))
    before, after = (
        {n: f.contents() for n, f in reader.fields.items() if n != "GGUF.kv_count"}
        for reader in (first, second)
    )
    assert after.pop(GGUF_KEY).startswith("qalora-compile ")  # who wrote it
    assert after == before
    written = {tensor.name: tensor for tensor in second.tensors}
    assert len(written) == len(first.tensors)
    on_codes = 0
    for old in first.tensors:
        new = written[old.name]
        assert old.tensor_type == new.tensor_type
        if old.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            a, b = (t.data.reshape(-1, BLOCK_BYTES) for t in (old, new))
            assert np.array_equal(a[:, 4:], b[:, 4:]), f"{old.name}: a code changed"
            assert np.array_equal(a[:, :2], b[:, :2]), f"{old.name}: a scale changed"
            assert not np.array_equal(a[:, 2:4], b[:, 2:4]), f"{old.name}: nothing was folded"
            on_codes += 1
        else:
            assert np.array_equal(old.data, new.data), old.name
    assert on_codes == 210

    from transformers import AutoModelForCausalLM

    with gguf_read_once():
        again: Any = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, dtype=torch.float32
        )
    call = road.call("The committee met on Tuesday to")
    with torch.no_grad():
        logits = folded(**call).logits
        found = again(**call).logits
        before = road.source.model(**call).logits
    assert worst(found, logits) <= 1e-2 * scale_of(logits)
    assert torch.equal(found.argmax(-1), logits.argmax(-1))
    assert worst(before, logits) > 1e-2 * scale_of(logits)
