"""Language models with a key-value cache: in ONNX Runtime, in GenAI, and what their files hold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qalora_compile as qc
from qalora_compile.api import complete_spec
from qalora_compile.capture.causal_lm import capture_causal_lm
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.exporters.onnx.genai_config import CONFIG_FILE, context_length, genai_config
from qalora_compile.ir.program import Program
from qalora_compile.ir.signature import InputLeaf, Signature
from qalora_compile.runtime import LanguageModel, kernel_level, library_path, open_session
from qalora_compile.runtime import decoder as decoder_module
from qalora_compile.runtime.decoder import Decoder
from qalora_compile.runtime.session import shares_cache
from tests.models import adapted, gpt2, llama, slow, token_ids

BUILDS = {"llama": llama, "gpt2": gpt2}
PROMPT = [5, 17, 40, 3]


def fold(build: Callable[[], nn.Module]) -> tuple[Any, qc.Program]:
    torch.manual_seed(0)
    model, ids = build(), token_ids(2, 16)
    return model, qc.fold_adapters(adapted(model, (ids,))).eval()


def greedy(folded: qc.Program, count: int, prompt: Sequence[int] = PROMPT) -> list[int]:
    """Tokens after a prompt, each from the full sequence, in torch."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(folded(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("name", "fusion"),
    [
        ("llama", "standard"),
        *slow(("llama", "none"), ("gpt2", "ort"), ("gpt2", "standard")),
    ],
)
def test_tokens_equal_those_of_torch(name: str, fusion: str, tmp_path: Path) -> None:
    model, folded = fold(BUILDS[name])
    path = tmp_path / "model.onnx"
    qc.export_model(qc.add_kv_cache(folded, model), path, qc.ExportSpec(fusion=fusion))
    for library in (False, True) if kernel_level() else (False,):
        deployed = LanguageModel(open_session(path, library=library, threads=1))
        assert deployed.cached
        assert list(deployed.generate(PROMPT, max_new_tokens=12)) == greedy(folded, 12)


Exported = tuple[Any, qc.Program, Path]


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, Exported]:
    """A model as it is written by default, and with ONNX Runtime's own operators."""
    model, folded = fold(llama)
    cached, folder = qc.add_kv_cache(folded, model), tmp_path_factory.mktemp("edge")
    made = []
    for name, spec in (("default", None), ("ort", qc.ExportSpec(fusion="ort"))):
        qc.export_model(cached, folder / f"{name}.onnx", spec)
        made.append((model, folded, folder / f"{name}.onnx"))
    return made[0], made[1]


@pytest.fixture(scope="module")
def exported(both_ways: tuple[Exported, Exported]) -> Exported:
    return both_ways[0]


@pytest.mark.parametrize("way", [0, 1], ids=["default", "ort"])
def test_any_batch_and_length_and_padding(way: int, both_ways: tuple[Exported, Exported]) -> None:
    _, folded, path = both_ways[way]
    model = LanguageModel(open_session(path))
    ids = token_ids(3, 9)
    with torch.no_grad():
        expected = folded(ids).logits.numpy()
    np.testing.assert_allclose(model.logits(ids.numpy()), expected, rtol=1e-4, atol=1e-5)
    padded = np.pad(ids.numpy(), ((0, 0), (2, 0)))
    mask = np.pad(np.ones((3, 9), np.int64), ((0, 0), (2, 0)))
    np.testing.assert_allclose(model.logits(padded, mask)[:, 2:], expected, rtol=1e-4, atol=1e-5)
    # several tokens of several sequences after a past with padding
    _, cache = model.step(padded[:, :6], mask[:, :6], model.empty_cache(3))
    later, _ = model.step(padded[:, 6:], mask, cache)
    np.testing.assert_allclose(later, expected[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "fusion"),
    [
        ({}, "standard"),
        ({"opset": 23}, "standard"),
        ({"opset": 22}, "ort"),
        ({"opset": 21}, "none"),
        ({"opset": 22, "target": "onnx"}, "none"),
        ({"target": "onnx"}, "standard"),
        ({"fusion": "none"}, "none"),
    ],
)
def test_the_fastest_form_that_the_opset_allows_is_taken(
    options: dict[str, Any], fusion: str, exported: Exported
) -> None:
    folded, spec = exported[1], qc.ExportSpec(**options)
    past = InputLeaf("past_key_values.0.key", "float32", ("batch", 2, "past", 16))
    cached = replace(folded, signature=Signature((past,), ("logits",)))
    assert complete_spec(cached, spec).fusion == fusion
    wanted = options.get("fusion", "none")
    assert complete_spec(folded, spec).fusion == wanted  # without a cache


def test_the_runtimes_own_operators(both_ways: tuple[Exported, Exported]) -> None:
    _, folded, path = both_ways[1]
    model = onnx.load(path)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["SkipSimplifiedLayerNormalization"] == 4
    assert (kinds["RotaryEmbedding"], kinds["MultiHeadAttention"]) == (4, 2)
    assert kinds["Softmax"] == kinds["Attention"] == kinds["RMSNormalization"] == 0
    assert {o.domain: o.version for o in model.opset_import}[""] == 22
    for library in (False, True) if kernel_level() else (False,):
        deployed = LanguageModel(open_session(path, library=library, threads=1))
        assert list(deployed.generate(PROMPT, max_new_tokens=12)) == greedy(folded, 12)
    broken = onnx.load(path)
    where = next(node for node in broken.graph.node if node.op_type == "MultiHeadAttention")
    where.input[5] = ""  # the mask
    onnx.save(broken, path.with_name("broken.onnx"))
    call, tolerance = [{"input_ids": token_ids(2, 9)}], qc.Tolerance(max_rel=1e-4)
    assert qc.verify_equivalence(folded, path, call, tolerance).passed
    assert not qc.verify_equivalence(folded, path.with_name("broken.onnx"), call, tolerance).passed


@pytest.mark.slow
def test_windows_of_attention_stay_exact(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    windowed = Gemma3ForCausalLM(config).eval()
    program = qc.quantize_groups(capture_causal_lm(windowed))
    qc.export_model(program, tmp_path / "model.onnx", qc.ExportSpec(fusion="ort"))
    model, ids = LanguageModel(open_session(tmp_path / "model.onnx")), token_ids(2, 12)
    found, cache = [], model.empty_cache(2)
    for begin, end in ((0, 1), (1, 9), (9, 12)):
        mask = np.ones((2, end), np.int64)
        logits, cache = model.step(ids.numpy()[:, begin:end], mask, cache)
        found.append(logits)
    past = [{n: torch.zeros(2, 1, 0, 16) for n in ("key", "value")} for _ in range(2)]
    with torch.no_grad():
        expected = program(ids, torch.ones_like(ids), torch.arange(12).repeat(2, 1), past)
    np.testing.assert_allclose(
        np.concatenate(found, 1), expected["logits"].numpy(), rtol=1e-4, atol=1e-5
    )


def test_a_layer_is_written_in_few_nodes(exported: tuple[Any, qc.Program, Path]) -> None:
    kinds = Counter(node.op_type for node in onnx.load(exported[2]).graph.node)
    assert (kinds["GroupQuantLinear"], kinds["Split"]) == (8, 4)
    assert (kinds["RMSNormalization"], kinds["RotaryEmbedding"]) == (5, 4)
    assert (kinds["CachedAttention"], kinds["Attention"]) == (2, 0)
    assert kinds["Softmax"] == 0
    layers = 2
    shared = sum(kinds.values()) - layers * 16 - 1  # one norm behind the last layer
    assert shared < 72, f"{shared} nodes for masks, angles and the head"


@pytest.mark.parametrize("library", [True, False])
def test_a_decoder_keeps_the_cache_in_place(
    exported: tuple[Any, qc.Program, Path], library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call by call, over buffers that grow, it gives the logits of steps that copy the cache."""
    monkeypatch.setattr(decoder_module, "_ROOM", 3)
    session = open_session(exported[2], library=library)
    assert shares_cache(session) is library
    model, ids = LanguageModel(session), token_ids(1, 40).numpy()
    decoders, begin, cache = [Decoder(model), Decoder(model)], 0, model.empty_cache()
    for end in (4, 5, 6, 7, 12, 13, 30, 31, 40):
        part, mask = ids[:, begin:end], np.ones((1, end), np.int64)
        expected, cache = model.step(part, mask, cache)
        for decoder in decoders:
            np.testing.assert_allclose(decoder.read(part), expected, rtol=1e-4, atol=1e-5)
        begin = end


@pytest.mark.slow
def test_a_cache_that_something_else_reads_is_not_shared(tmp_path: Path) -> None:
    model, folded = fold(llama)
    spec = qc.ExportSpec(fusion="none")
    qc.export_model(qc.add_kv_cache(folded, model), tmp_path / "model.onnx", spec)
    assert not shares_cache(open_session(tmp_path / "model.onnx", library=True))


def test_no_weight_is_stored_twice_or_in_float(
    exported: tuple[Any, qc.Program, Path],
) -> None:
    model = onnx.load(exported[2])
    read = {name for node in model.graph.node for name in node.input}
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names))
    assert set(names) <= read
    assert not any(name.endswith("_proj.weight") for name in names)
    assert sum(tuple(t.dims) == (128, 64) for t in model.graph.initializer) == 1  # tied


@pytest.mark.slow
def test_the_last_logits_alone(exported: tuple[Any, qc.Program, Path], tmp_path: Path) -> None:
    model, folded, _ = exported
    path = tmp_path / "last.onnx"
    qc.export_model(qc.add_kv_cache(folded, model, last_logits=True), path)
    deployed = LanguageModel(open_session(path))
    assert deployed.logits(token_ids(2, 7).numpy()).shape == (2, 7, 128), "token by token"
    assert list(deployed.generate(PROMPT, max_new_tokens=8)) == greedy(folded, 8)
    report = qc.verify_equivalence(
        folded, path, [{"input_ids": token_ids(2, 9)}], qc.Tolerance(max_rel=1e-4)
    )
    assert report.passed, report


def test_a_planted_fault_in_the_cache_is_found(
    exported: tuple[Any, qc.Program, Path], tmp_path: Path
) -> None:
    _, folded, path = exported
    call, tolerance = [{"input_ids": token_ids(2, 9)}], qc.Tolerance(max_rel=1e-4)
    assert qc.verify_equivalence(folded, path, call, tolerance).passed
    broken = onnx.load(path)
    node = next(n for n in broken.graph.node if n.op_type == "CachedAttention")
    node.input[4], node.input[5] = node.input[5], node.input[4]  # past keys for past values
    onnx.save(broken, tmp_path / "broken.onnx")
    assert not qc.verify_equivalence(folded, tmp_path / "broken.onnx", call, tolerance).passed


@pytest.mark.parametrize("target", ["ort", *slow("ort-stock", "onnx")])
def test_weights_left_in_their_file_give_the_same_model(target: str, tmp_path: Path) -> None:
    model, folded = fold(llama)
    folded.save(tmp_path / "folded")
    spec = qc.ExportSpec(target=target)
    for name, source in (
        ("now", folded),
        ("later", Program.load(tmp_path / "folded", lazy=True)),
    ):
        qc.export_model(qc.add_kv_cache(source, model), tmp_path / f"{name}.onnx", spec)
    first, second = (onnx.load(tmp_path / f"{name}.onnx") for name in ("now", "later"))
    stored = [
        {t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer}
        for m in (first, second)
    ]
    assert stored[0].keys() == stored[1].keys()
    for name, values in stored[0].items():
        assert np.array_equal(values, stored[1][name]), name


@pytest.mark.parametrize("way", [0, 1], ids=["default", "ort"])
def test_genai_generates_the_same_tokens(
    way: int, both_ways: tuple[Exported, Exported], tmp_path: Path
) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model, folded, path = both_ways[way]
    (tmp_path / "model.onnx").write_bytes(path.read_bytes())
    signature = qc.add_kv_cache(folded, model).signature
    described = model.config.to_dict()
    libraries = [None] + ([library_path().name] if kernel_level() else [])
    for library in libraries:
        if library:
            (tmp_path / library).write_bytes(library_path().read_bytes())
        config = genai_config(signature, described, {}, library=library)
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
        loaded = genai.Model(str(tmp_path))
        parameters = genai.GeneratorParams(loaded)
        parameters.set_search_options(max_length=len(PROMPT) + 12, do_sample=False)
        generator = genai.Generator(loaded, parameters)
        generator.append_tokens(np.array([PROMPT], dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found = [int(t) for t in generator.get_sequence(0)[len(PROMPT) :]]
        assert found == greedy(folded, 12)[: len(found)]
        assert found[-1] == 0 or len(found) == 12  # 0 ends the sequence


def test_genai_goes_on_after_an_interruption_as_the_page_says(
    both_ways: tuple[Exported, Exported], tmp_path: Path
) -> None:
    """docs/reference/clients.md: go back by two tokens, and append them with the new ones."""
    genai = pytest.importorskip("onnxruntime_genai")
    model, folded, path = both_ways[0]
    (tmp_path / "model.onnx").write_bytes(path.read_bytes())
    config = genai_config(qc.add_kv_cache(folded, model).signature, model.config.to_dict(), {})
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
    loaded = genai.Model(str(tmp_path))
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(np.array([PROMPT], dtype=np.int32))
    for _ in range(3):
        generator.generate_next_token()
    sequence, new = [int(token) for token in generator.get_sequence(0)], [7, 30]
    generator.rewind_to(len(sequence) - 2)
    generator.append_tokens(np.array([sequence[-2:] + new], dtype=np.int32))
    for _ in range(3):
        generator.generate_next_token()
    asked = sequence + new
    found = [int(token) for token in generator.get_sequence(0)]
    assert found[: len(asked)] == asked
    assert found[len(asked) :] == greedy(folded, 3, asked)[: len(found) - len(asked)]


def test_the_configuration_says_what_the_model_is() -> None:
    cache = [
        InputLeaf(f"past_key_values.{i}.{part}", "float32", ("batch", 2, "past", 16))
        for i in (0, 1)
        for part in ("key", "value")
    ]
    tokens = InputLeaf("input_ids", "int64", ("batch", "sequence"))
    signature = Signature((tokens, *cache), ("logits",))
    model = {
        "model_type": "llama",
        "vocab_size": 9,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "eos_token_id": 2,
        "max_position_embeddings": 77,
    }
    value = genai_config(signature, model, {"eos_token_id": [2, 5], "top_p": 0.9})
    assert value["model"]["type"] == "llama"
    assert value["model"]["context_length"] == value["search"]["max_length"] == 77
    assert value["model"]["eos_token_id"] == [2, 5]
    assert value["model"]["pad_token_id"] == 2
    decoder = value["model"]["decoder"]
    assert decoder["num_key_value_heads"] == 2
    assert decoder["head_size"] == 16
    assert decoder["num_hidden_layers"] == 2
    assert "position_ids" not in decoder["inputs"]
    assert value["search"]["top_p"] == 0.9
    assert genai_config(signature, model | {"model_type": "new"}, {})["model"]["type"] == "decoder"
    odd = InputLeaf(cache[0].name, "float32", ("batch", 3, "past", 16))
    with pytest.raises(UnsupportedError, match="one shape"):
        genai_config(Signature((tokens, odd, *cache[1:]), ("logits",)), model, {})


def test_the_context_is_a_limit(exported: tuple[Any, qc.Program, Path]) -> None:
    limit = context_length(exported[0].config.to_dict())
    assert limit == 64
    model = LanguageModel(open_session(exported[2]), context_length=limit)
    with pytest.raises(UserInputError, match="more than the 64"):
        model.generate(PROMPT, max_new_tokens=61)
    assert len(list(model.generate(PROMPT, max_new_tokens=60))) == 60
