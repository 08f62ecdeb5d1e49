"""Encoder-decoder models as two files: the tokens of torch, what the files hold, and faults."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import qalora_compile as qc
from qalora_compile.errors import PreconditionError, UnsupportedError, UserInputError
from qalora_compile.exporters.onnx.genai_config import CONFIG_FILE, genai_whisper_config
from qalora_compile.runtime import EncoderDecoder, kernel_level, library_path
from tests.models import VOCABULARY, randomize_adapters, slow
from tests.zoo.entries import ENTRIES

LIBRARIES = (False, True) if kernel_level() else (False,)
NEW_TOKENS = 16
START = {"t5": 0, "bart": 2, "whisper": 2}
FILES = ("encoder_model.onnx", "decoder_model.onnx")
LAYERS = 16
"""Linear layers of each file: six and two of every encoder layer, cross keys and values too."""


@dataclass(frozen=True)
class Deployed:
    """A model with noise in its adapters, folded, and exported as two files.

    Attributes:
        name: Of the entry of the zoo.
        plain: The model as it was.
        model: The same with its adapters, which `generate` runs.
        folded: The program of it.
        parts: Encoder and decoder.
        folder: With the two files.
    """

    name: str
    plain: nn.Module
    model: Any
    folded: qc.Program
    parts: tuple[qc.Program, qc.Program]
    folder: Path


def lively(model: Any) -> Any:
    """The model with weights of such sizes that its tokens depend on its input; in place.

    As it is initialized, it repeats the token it is given.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.1 if "embed_tokens" in name or "shared" in name else 30)
    return model


def build(name: str, layers: int = 2) -> Any:
    """A model of the zoo."""
    torch.manual_seed(0)
    return lively(ENTRIES[name].build(layers))


@pytest.fixture(scope="module", params=slow("t5", "bart", "whisper"))
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    plain = build(request.param)
    model = copy.deepcopy(plain)
    _, kwargs = ENTRIES[request.param].inputs(2, 7, 0)
    program = qc.adapt_module_(model, (), kwargs, adapter=qc.AdapterSpec(rank=4))
    folded = qc.fold_adapters(randomize_adapters(program).eval())
    parts = qc.split_encoder_decoder(folded, plain)
    folder = tmp_path_factory.mktemp("edge")
    for file, part in zip(FILES, parts, strict=True):
        report = qc.export_model(part, folder / file, qc.ExportSpec(fusion="standard"))
        assert report.quantized_layers == LAYERS
    return Deployed(request.param, plain, model.eval(), folded, parts, folder)


def inputs(name: str, batch: int, seed: int) -> dict[str, Tensor]:
    """Of the encoder; rows of a batch are padded on the right and on the left."""
    _, kwargs = ENTRIES[name].inputs(batch, 9, seed)
    kwargs.pop("decoder_input_ids")
    if batch > 1 and "attention_mask" in kwargs:
        kwargs["attention_mask"][0, 5:] = 0
        kwargs["attention_mask"][1, :3] = 0
    return kwargs


def by_torch(deployed: Deployed, kwargs: dict[str, Tensor], prompt: list[int]) -> Any:
    """Greedy tokens of transformers' own `generate`, prompt included."""
    from transformers import GenerationConfig, GenerationMixin

    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, pad_token_id=0, decoder_start_token_id=prompt[0]
    )
    deployed.model.generation_config = config  # what is not given is taken from here
    batch = len(next(iter(kwargs.values())))
    begin = torch.tensor([prompt] * batch)
    with torch.no_grad():
        return GenerationMixin.generate(
            deployed.model, **kwargs, decoder_input_ids=begin, do_sample=False, use_cache=True
        ).numpy()


def feed(kwargs: dict[str, Tensor]) -> dict[str, Any]:
    """The same for the exported encoder."""
    names = {"input_features": "audio_features"}
    return {names.get(name, name): value.numpy() for name, value in kwargs.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "more"), [(1, []), (3, [9, 5])])
def test_greedy_tokens_equal_those_of_torch(
    deployed: Deployed, batch: int, more: list[int]
) -> None:
    kwargs, prompt = inputs(deployed.name, batch, seed=5), [START[deployed.name], *more]
    expected = by_torch(deployed, kwargs, prompt)
    assert expected.shape == (batch, len(prompt) + NEW_TOKENS)
    if batch > 1:
        assert len({tuple(row) for row in expected}) > 1, "no row depends on its input"
    for library in LIBRARIES:
        model = EncoderDecoder.open(deployed.folder, threads=1, library=library)
        encoded, cache = model.encode(feed(kwargs)), model.empty_cache(batch)
        tokens = fresh = np.array([prompt] * batch, np.int64)
        for _ in range(NEW_TOKENS):
            logits, cache = model.step(fresh, encoded, cache)
            fresh = logits[:, -1].argmax(-1)[:, None].astype(np.int64)
            tokens = np.concatenate([tokens, fresh], axis=1)
        np.testing.assert_array_equal(tokens, expected)


def test_generate_yields_the_same_tokens_and_stops(deployed: Deployed) -> None:
    kwargs = inputs(deployed.name, 1, seed=6)
    start = [START[deployed.name]]
    expected = [int(t) for t in by_torch(deployed, kwargs, start)[0, 1:]]
    model = EncoderDecoder.open(deployed.folder, start=start, context_length=64)
    assert list(model.generate(feed(kwargs), max_new_tokens=NEW_TOKENS)) == expected
    stop = expected[4]
    found = list(model.generate(feed(kwargs), max_new_tokens=NEW_TOKENS, stop=[stop]))
    assert found == expected[: expected.index(stop)]


def test_names_and_shapes_are_those_that_runtimes_know(deployed: Deployed) -> None:
    encoder, decoder = deployed.parts
    given = {leaf.name: leaf.shape for leaf in encoder.signature.inputs}
    taken = {leaf.name: leaf.shape for leaf in decoder.signature.inputs}
    length: int | str = "encoder_sequence"
    if deployed.name == "whisper":
        length = 50
        assert given == {"audio_features": ("batch", 16, 100)}
        assert "encoder_attention_mask" not in taken
    else:
        assert given == dict.fromkeys(("input_ids", "attention_mask"), ("batch", length))
        assert taken["encoder_attention_mask"] == ("batch", length)
    cross = [f"{i}.encoder.{part}" for i in (0, 1) for part in ("key", "value")]
    assert encoder.signature.outputs == (
        "encoder_hidden_states",
        *(f"present.{name}" for name in cross),
    )
    assert taken["input_ids"] == ("batch", "sequence")
    assert taken["past_key_values.1.decoder.value"] == ("batch", 4, "past_sequence", 16)
    assert all(taken[f"past_key_values.{name}"] == ("batch", 4, length, 16) for name in cross)
    assert decoder.signature.outputs[:3] == (
        "logits",
        "present.0.decoder.key",
        "present.0.decoder.value",
    )
    assert (encoder.signature.ranges, decoder.signature.ranges) == ((), ())


def test_each_layer_is_in_one_file_and_none_in_float(deployed: Deployed) -> None:
    stored = []
    for file in FILES:
        graph = onnx.load(deployed.folder / file).graph
        read = {name for node in graph.node for name in node.input}
        names = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        assert set(names) <= read
        stored.append(names)
    rows = [{r.path for r in part.plan.to_quantize()} for part in deployed.parts]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == {r.path for r in deployed.folded.plan.to_quantize()}
    for path in rows[0] | rows[1]:
        assert not any(f"{path}.weight" in names for names in stored)
    both = {name for name in set(stored[0]) & set(stored[1]) if len(stored[0][name]) == 2}
    assert {stored[0][name] for name in both} == (
        set() if deployed.name == "whisper" else {(VOCABULARY, 64)}
    )
    # What the decoder attends to in the input is computed once, by the encoder.
    cross = [p for p in rows[0] if "EncDecAttention" in p or "encoder_attn" in p]
    assert len(cross) == 2 * 2
    assert all(p.rpartition(".")[2] in ("k", "v", "k_proj", "v_proj") for p in cross)


def test_attention_reads_the_encoders_keys_as_they_come(deployed: Deployed) -> None:
    """As heads: to turn them to rows would copy all of them in every call."""
    nodes = onnx.load(deployed.folder / FILES[1]).graph.node
    cross = {leaf.name for leaf in deployed.parts[1].signature.cross_cache}
    readers = {node.op_type for node in nodes if cross & set(node.input)}
    assert "Attention" in readers
    assert readers <= {"Attention", "Shape"}


def test_the_parts_keep_reasons_and_passes(deployed: Deployed) -> None:
    rows = {(r.weight, r.kind): r for r in deployed.folded.plan}
    for part in deployed.parts:
        assert part.stage == deployed.folded.stage
        assert part.history == deployed.folded.history
        for row in part.plan:
            same = rows[row.weight, row.kind]
            assert (row.decision, row.reason, row.bits) == (same.decision, same.reason, same.bits)
        given = deployed.folded.tensors()
        assert all(t is given[name] for name, t in part.tensors().items() if name in given)


def verdict(deployed: Deployed, folder: Path, library: Path | None = None) -> Any:
    _, kwargs = ENTRIES[deployed.name].inputs(2, 8, 3)
    return qc.verify_equivalence(
        deployed.folded, folder, [kwargs], qc.Tolerance(max_rel=1e-4), library=library
    )


def test_verify_compares_logits_hidden_states_and_every_site(deployed: Deployed) -> None:
    for library in (None, library_path()) if kernel_level() else (None,):
        report = verdict(deployed, deployed.folder, library)
        assert report.passed, str(report)
        assert {c.name for c in report.outputs} == {"logits", "encoder_last_hidden_state"}
        assert len(report.sites) == 2 * LAYERS


def swap_cross(decoder: onnx.ModelProto, _: onnx.ModelProto) -> None:
    """Keys for values in one layer."""
    names = [f"past_key_values.1.encoder.{part}" for part in ("key", "value")]
    other = dict(zip(names, reversed(names), strict=True))
    for node in decoder.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = other.get(name, name)


def swap_layers(_: onnx.ModelProto, encoder: onnx.ModelProto) -> None:
    """The keys of one layer for those of another."""
    names = [f"present.{layer}.encoder.key" for layer in (0, 1)]
    other = dict(zip(names, reversed(names), strict=True))
    for node in encoder.graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = other.get(name, name)


@pytest.mark.parametrize("plant", [swap_cross, swap_layers])
def test_a_planted_fault_is_found(deployed: Deployed, plant: Any, tmp_path: Path) -> None:
    encoder, decoder = (onnx.load(deployed.folder / file) for file in FILES)
    plant(decoder, encoder)
    for file, model in zip(FILES, (encoder, decoder), strict=True):
        onnx.save(model, tmp_path / file)
    assert not verdict(deployed, tmp_path).passed


def test_half_a_folder_is_refused(deployed: Deployed, tmp_path: Path) -> None:
    shutil.copy(deployed.folder / FILES[1], tmp_path)
    with pytest.raises(UserInputError, match=r"no encoder_model\.onnx"):
        verdict(deployed, tmp_path)
    with pytest.raises(UserInputError, match="decoder of an encoder-decoder model"):
        verdict(deployed, deployed.folder / FILES[1])
    shutil.copy(deployed.folder / FILES[1], tmp_path / FILES[0])
    with pytest.raises(UserInputError, match="belong to different models"):
        verdict(deployed, tmp_path)
    with pytest.raises(UnsupportedError, match="not the two graphs of one model"):
        EncoderDecoder.open(tmp_path)


def test_bad_calls_are_refused(deployed: Deployed) -> None:
    model = EncoderDecoder.open(deployed.folder, context_length=20)
    one, three = (feed(inputs(deployed.name, batch, 0)) for batch in (1, 3))
    with pytest.raises(UserInputError, match="names no token"):
        model.generate(one, max_new_tokens=4)
    with pytest.raises(UserInputError, match="more than the 20"):
        model.generate(one, prompt=[2], max_new_tokens=20)
    with pytest.raises(UserInputError, match="3 inputs were given"):
        model.generate(three, prompt=[2], max_new_tokens=4)
    with pytest.raises(UserInputError, match="the inputs are pixels"):
        model.encode({"pixels": np.zeros((1, 2))})


@pytest.fixture(scope="module")
def t5() -> tuple[Any, qc.Program]:
    model = build("t5")
    return model, qc.capture_model(model, *ENTRIES["t5"].inputs(2, 7, 0))


@pytest.mark.slow
def test_a_tied_head_that_was_named_is_quantized_in_the_decoder(t5: tuple[Any, qc.Program]) -> None:
    model, program = t5
    quantized = qc.quantize_groups(program, targets=["lm_head", "DenseReluDense.wo"])
    encoder, decoder = qc.split_encoder_decoder(quantized, model)
    widths = [sorted(r.weight for r in part.plan.to_quantize()) for part in (encoder, decoder)]
    assert len(widths[0]) == 2
    assert len(widths[1]) == 3
    assert "lm_head.weight" in widths[1]
    _, kwargs = ENTRIES["t5"].inputs(2, 7, 1)
    given = {name: kwargs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = quantized.eval()(**kwargs)
        encoded = encoder.eval()(**given)
        empty = {name: torch.zeros(2, 4, 0, 16) for name in ("key", "value")}
        past = [{"decoder": empty, "encoder": layer["encoder"]} for layer in encoded["present"]]
        found = decoder.eval()(kwargs["decoder_input_ids"], given["attention_mask"], past)
    torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-4, atol=1e-4)


def test_a_part_without_a_quantized_layer_stays_in_float(t5: tuple[Any, qc.Program]) -> None:
    model, program = t5
    quantized = qc.quantize_groups(program, targets=["re:^decoder.*SelfAttention"])
    encoder, decoder = qc.split_encoder_decoder(quantized, model)
    assert not encoder.plan.to_quantize()
    assert len(decoder.plan.to_quantize()) == 8
    assert encoder.stage == decoder.stage == quantized.stage


@pytest.mark.slow
def test_another_model_is_refused(t5: tuple[Any, qc.Program]) -> None:
    quantized = qc.quantize_groups(t5[1])
    with pytest.raises(PreconditionError, match="has no tensor"):
        qc.split_encoder_decoder(quantized, ENTRIES["bart"].build())
    with pytest.raises(UnsupportedError):
        qc.split_encoder_decoder(quantized, ENTRIES["llama"].build())


@pytest.mark.slow
def test_genai_runs_whisper(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_target_positions=64,
        init_std=0.3,  # tokens depend on the input
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=0,
    )
    model = WhisperForConditionalGeneration(config).eval()
    sound = torch.randn(1, 8, 3000)
    example = {
        "input_features": sound.repeat(2, 1, 1),
        "decoder_input_ids": torch.ones(2, 3).long(),
    }
    quantized = qc.quantize_groups(qc.capture_model(model, (), example)).eval()
    parts = qc.split_encoder_decoder(quantized, model)
    for file, part in zip(FILES, parts, strict=True):
        qc.export_model(part, tmp_path / file)
    prompt = [3, 7, 9]
    exported = EncoderDecoder.open(tmp_path)
    expected = exported.generate(feed({"input_features": sound}), prompt=prompt, max_new_tokens=20)
    tokens = [*prompt, *expected]
    assert len(set(tokens[3:])) > 3
    encoder, decoder = (part.signature for part in parts)
    for library in [None] + ([library_path().name] if kernel_level() else []):
        if library:
            shutil.copy(library_path(), tmp_path)
        value = genai_whisper_config(
            encoder, decoder, config.to_dict(), {}, files=FILES, library=library
        )
        (tmp_path / CONFIG_FILE).write_text(json.dumps(value), "utf-8")
        loaded = genai.Model(str(tmp_path))
        parameters = genai.GeneratorParams(loaded)
        parameters.set_search_options(max_length=len(tokens), do_sample=False)
        generator = genai.Generator(loaded, parameters)
        named = genai.NamedTensors()
        named["audio_features"] = sound.numpy()
        named["input_ids"] = np.array([prompt], np.int32)
        generator.set_inputs(named)
        while not generator.is_done():
            generator.generate_next_token()
        assert [int(t) for t in generator.get_sequence(0)] == tokens
    with pytest.raises(UnsupportedError, match="3000 frames"):
        heard = dataclasses.replace(encoder.inputs[0], shape=("batch", 8, 100))
        short = dataclasses.replace(encoder, inputs=(heard,))
        genai_whisper_config(short, decoder, config.to_dict(), {}, files=FILES)
    with pytest.raises(UnsupportedError, match="this is bart"):
        genai_whisper_config(encoder, decoder, {"model_type": "bart"}, {}, files=FILES)
