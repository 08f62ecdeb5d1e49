"""GGUF: what is written is read back by the gguf package and by transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qalora_compile as qc
from qalora_compile.api.run_folder import save_description
from qalora_compile.capture.describe_model import describe
from qalora_compile.capture.load_source import load_source
from qalora_compile.errors import (
    OutputError,
    PreconditionError,
    UnsupportedError,
    UserInputError,
)
from qalora_compile.exporters.checkpoints.gguf import write as exporter
from qalora_compile.exporters.checkpoints.gguf.metadata import architecture_of, context_of
from qalora_compile.exporters.checkpoints.gguf.tokenizers import pre_tokenizer
from qalora_compile.ir.affine import GroupAffine
from tests.exporters.checkpoint_cases import (
    HIDDEN,
    TEXT,
    affine_of,
    causal_lm,
    folded,
    llama_and_program,
    write_tokenizer,
)
from tests.models import capture_transformer, gpt2, scale_of, token_ids, worst

GGUF = qc.ExportSpec(target="gguf")
HALF = 2.0**-11
"""Half a unit in the last place of float16, as a part of the value."""
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


def fields(path: Path) -> dict[str, Any]:
    return {n: f.contents() for n, f in gguf.GGUFReader(str(path)).fields.items()}


def name_of(site: str) -> str:
    _, _, number, *rest = site.split(".")
    return f"blk.{number}.{NAMES['.'.join(rest)]}.weight"


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp orders them, by a loop."""
    half = len(rows) // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half)
             for part in (0, 1)]  # fmt: skip
    return rows[order]


def heads_of(name: str) -> int:
    return {"attn_q": 4, "attn_k": 2}.get(name.split(".")[2], 0)


def write(model: nn.Module, program: qc.Program, folder: Path, **options: Any) -> Path:
    path = folder / "model.gguf"
    qc.export_model(program, path, dataclasses.replace(GGUF, **options), model=model)
    return path


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 64)])
def test_codes_are_kept_and_parameters_rounded_to_half(
    tmp_path: Path, bits: int, group_size: int
) -> None:
    model, program = llama_and_program(bits, group_size)
    path = tmp_path / "model.gguf"
    report = qc.export_model(program, path, GGUF, model=model)
    found, rows = tensors(path), {row.name: row for row in report.stored}
    for site in program.plan.to_quantize():
        name, affine = name_of(site.name), affine_of(program, site)
        wanted = affine.dequantize().numpy()
        permuted = neighbours(wanted, heads) if (heads := heads_of(name)) else wanted
        stored = found[name]
        values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        error = float(np.abs(values - permuted).max())
        assert rows[name].max_abs_error == pytest.approx(error, rel=1e-3, abs=1e-7)
        assert stored.tensor_type == gguf.GGMLQuantizationType.Q4_1
        low_high = stored.data.reshape(-1, 20)[:, 4:]
        codes = np.concatenate([low_high & 15, low_high >> 4], axis=1).reshape(wanted.shape)
        own = affine.codes.numpy()
        assert np.array_equal(codes, neighbours(own, heads) if heads else own)
        most = float(affine.scale.abs().max()) * (2**bits - 1) + float(affine.offset.abs().max())
        assert 0 < error <= most * HALF
    assert {row.form for row in report.stored} <= {"Q4_1", "F32", "F16"}
    assert report.capabilities["scale"].kind == "rounds"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_same_function(tmp_path: Path, kind: str) -> None:
    model = causal_lm(kind, tie_word_embeddings=kind in ("llama", "qwen3"))
    program = folded(model)
    path = write(model, program, tmp_path)
    (tmp_path / "tok").mkdir()
    again = read_by_transformers(path)
    ids = token_ids(2, 11)
    expected = program(ids).logits
    assert worst(again(ids).logits, expected) <= 1e-2 * scale_of(expected)
    assert worst(again(ids).logits, model(ids).logits) > 1e-2 * scale_of(expected)
    head = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert head == (kind in ("llama", "qwen3"))


def read_by_transformers(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()


def test_rows_in_the_wrong_order_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, program = llama_and_program()
    monkeypatch.setattr(exporter, "interleave_rows", lambda values, _heads: values)
    again = read_by_transformers(write(model, program, tmp_path))
    ids = token_ids(2, 11)
    expected = program(ids).logits
    assert worst(again(ids).logits, expected) > 1e-2 * scale_of(expected)


def test_gguf_to_adapters_to_gguf_keeps_every_code_byte(tmp_path: Path) -> None:
    model = causal_lm()
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    plain = qc.quantize_groups(capture_transformer(model))
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    qc.export_model(plain, first, GGUF, model=model, tokenizer=tokenizer)
    source = load_source(str(first))
    program = qc.quantize_groups(source.capture(), stored=source.stored()[0])
    adapters = qc.insert_adapters(program, qc.AdapterSpec(rank=4))
    with torch.no_grad():
        for parameter in adapters.adapter_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    qc.export_model(qc.fold_adapters(adapters), second, GGUF, model=first)
    before, after = tensors(first), tensors(second)
    assert list(before) == list(after)
    moved = 0
    for name, old in before.items():
        new = after[name]
        assert old.tensor_type == new.tensor_type
        if old.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            a, b = old.data.reshape(-1, 20), new.data.reshape(-1, 20)
            assert np.array_equal(a[:, 4:], b[:, 4:]), f"{name}: codes"
            assert np.array_equal(a[:, :2], b[:, :2]), f"{name}: scale"
            moved += int((a[:, 2:4] != b[:, 2:4]).any())
        else:
            assert np.array_equal(old.data, new.data), name
    assert moved == 14, "the adapters are in the minima of every layer"
    assert fields(first) == fields(second)


def test_metadata_and_tokenizer_are_complete(tmp_path: Path) -> None:
    model, program = llama_and_program()
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "model.gguf"
    qc.export_model(program, path, GGUF, model=model, tokenizer=tokenizer)
    found = fields(path)
    assert found["general.architecture"] == "llama"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    expected = {
        "block_count": 2, "embedding_length": HIDDEN, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "context_length": 64,
        "rope.dimension_count": 16, "rope.freq_base": 10000.0, "vocab_size": 300,
    }  # fmt: skip
    assert {key: found[f"llama.{key}"] for key in expected} == expected
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert len(found["tokenizer.ggml.tokens"]) == 300
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD299]"
    assert found["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL
    assert found["tokenizer.ggml.eos_token_id"] == 0
    source = load_source(str(path))
    text = TEXT.replace("1923", "").replace("45", "")  # transformers keeps digits together
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tokenizer)
    assert source.tokenizer(text).input_ids == own(text).input_ids


@pytest.mark.parametrize(("ends", "turn"), [([0, 7], 7), ([0], None), (0, None), ([5, 0, 9], 9)])
def test_a_further_end_of_an_answer_is_the_end_of_a_turn(
    tmp_path: Path, ends: Any, turn: int | None
) -> None:
    model, program = llama_and_program()
    settings: Any = model.generation_config
    settings.eos_token_id = ends
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "model.gguf"
    qc.export_model(program, path, GGUF, model=model, tokenizer=tokenizer)
    assert fields(path)["tokenizer.ggml.eos_token_id"] == 0
    assert fields(path).get("tokenizer.ggml.eot_token_id") == turn


def test_a_file_of_metadata_alone_serves_as_description(tmp_path: Path) -> None:
    model, program = llama_and_program()
    tokenizer = write_tokenizer(tmp_path / "tokenizer", digits=False)
    first = tmp_path / "first.gguf"
    qc.export_model(program, first, GGUF, model=model, tokenizer=tokenizer)
    save_description(model, tmp_path, first)
    folder = tmp_path / "model"
    assert tensors(folder / "metadata.gguf") == {}
    second = tmp_path / "second.gguf"
    qc.export_model(program, second, GGUF, model=folder)
    assert second.read_bytes() == first.read_bytes()
    assert fields(second)["tokenizer.ggml.pre"] == "gpt-2"


def test_llama3_frequencies_become_factors(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    _, program = llama_and_program()
    model = causal_lm(rope_parameters=rope)
    path = write(model, program, tmp_path)
    factors = tensors(path)["rope_freqs.weight"].data
    rotary: Any = model.get_submodule("model.rotary_emb")
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    assert np.allclose(plain / factors, rotary.inv_freq.numpy(), rtol=1e-6)
    assert factors[0] == pytest.approx(1.0, rel=1e-6) and factors[-1] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("settings", "context"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": 64, "sliding_window": 32}, 32),
        ({"max_position_embeddings": 64, "sliding_window": 128}, 64),
        ({"max_position_embeddings": 64, "sliding_window": 32, "use_sliding_window": False}, 64),
    ],
)
def test_a_window_ends_the_context(settings: dict[str, Any], context: int) -> None:
    assert context_of(settings) == context


def test_rules_for_words_are_known_by_what_they_do(tmp_path: Path) -> None:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte_level = {"type": "ByteLevel", "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    plain = byte_level | {"use_regex": False}

    def rule(*steps: dict[str, Any], kind: str = "BPE") -> str:
        value = {"model": {"type": kind}, "normalizer": None,
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}  # fmt: skip
        return pre_tokenizer(value, tmp_path)

    split = {"type": "Split", "pattern": {"Regex": words}}
    apart = {"type": "Split", "pattern": {"Regex": words.replace("{1,3}", "")}}
    assert rule(byte_level) == "gpt-2"
    assert rule(digits, byte_level) == "smollm"
    assert rule(split, plain) == "llama-bpe"
    assert rule(apart, plain) == "qwen2"
    for steps in (
        (digits | {"individual_digits": False}, byte_level),
        (plain,),
        (split, byte_level),
        ({"type": "Split", "pattern": {"Regex": "x"}}, plain),
        (byte_level, digits),
    ):
        with pytest.raises(UnsupportedError, match="no rule of llama.cpp"):
            rule(*steps)
    with pytest.raises(UnsupportedError, match="for a Unigram tokenizer"):
        rule(byte_level, kind="Unigram")


@pytest.mark.slow
def test_what_is_not_on_codes_takes_the_smallest_exact_type(tmp_path: Path) -> None:
    model = causal_lm(tie_word_embeddings=False)
    with torch.no_grad():
        table = model.get_parameter("model.embed_tokens.weight")
        kind = gguf.GGMLQuantizationType.Q8_0
        data = gguf.quants.quantize(table.detach().numpy().copy(), kind)
        table.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)))
        head = model.get_parameter("lm_head.weight")
        head.copy_(head.bfloat16().float() * 2.0**20)  # beyond float16
    program = qc.quantize_groups(capture_transformer(model), exclude=["o_proj", "lm_head"])
    report = qc.export_model(program, tmp_path / "a.gguf", GGUF, model=model)
    forms = {row.name: row.form for row in report.stored}
    assert forms["token_embd.weight"] == "Q8_0"
    assert forms["output.weight"] == "BF16"
    assert forms["blk.0.attn_output.weight"] == "F32"
    assert max(row.max_abs_error for row in report.stored if row.form != "Q4_1") == 0
    spec = dataclasses.replace(GGUF, float_type="q8_0")
    rough = qc.export_model(program, tmp_path / "b.gguf", spec, model=model)
    assert {r.form for r in rough.stored} == {"Q4_1", "Q8_0", "F32"}
    assert max(r.relative_error for r in rough.stored if r.form == "Q8_0") > 1e-4
    with pytest.raises(UserInputError, match="float16 holds at most 65504"):
        write(model, program, tmp_path, float_type="f16")


@pytest.mark.slow
def test_eight_bits_and_odd_groups_are_stored_as_floats_and_said(tmp_path: Path) -> None:
    model = causal_lm(intermediate_size=80)
    captured = capture_transformer(model)
    program = qc.quantize_groups(captured)
    report = qc.export_model(program, tmp_path / "a.gguf", GGUF, model=model)
    odd = {row.source.rpartition(".")[2]: row for row in report.stored if row.remark}
    assert set(odd) == {"down_proj"}
    assert "groups of 32 in rows of 80" in odd["down_proj"].remark
    assert odd["down_proj"].max_abs_error == 0
    ids = token_ids(1, 7)
    again = read_by_transformers(tmp_path / "a.gguf")
    assert worst(again(ids).logits, program(ids).logits) <= 1e-2 * scale_of(program(ids).logits)
    for bits, group_size, words in ((8, 32, "codes of 8 bits"), (4, 16, "not blocks of 32")):
        odd_one = qc.quantize_groups(captured, qc.QuantSpec(bits=bits, group_size=group_size))
        with pytest.raises(UnsupportedError, match=words):
            write(model, odd_one, tmp_path)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_blocks_are_those_of_the_gguf_package(n: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, 32 * blocks), generator=generator, dtype=torch.uint8)
    scale, offset = (torch.randn(n, blocks, generator=generator).half().float() for _ in range(2))
    affine = GroupAffine(codes, scale, offset, 4, 32).validate()
    data = exporter.pack_q4_1(affine)
    again = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_1)
    assert np.array_equal(again, affine.dequantize().numpy())


@given(st.integers(1, 4), st.integers(1, 6))
def test_rows_of_both_halves_alternate(heads: int, half: int) -> None:
    rows = torch.arange(heads * half * 2)
    assert (
        exporter.interleave_rows(rows, heads).tolist() == neighbours(rows.numpy(), heads).tolist()
    )
    assert exporter.interleave_rows(rows, 0) is rows


# Bad input: refused before anything is written.


def test_values_beyond_half_are_refused_by_name(tmp_path: Path) -> None:
    model, program = llama_and_program()
    tensor = program.tensors()["model.layers.1.mlp.up_proj.offset"]
    tensor[3, 1] += 7e4
    try:
        with pytest.raises(UserInputError, match="offset reaches 70000") as caught:
            write(model, program, tmp_path)
    finally:
        tensor[3, 1] -= 7e4
    assert caught.value.where == "model.layers.1.mlp.up_proj"
    assert list(tmp_path.iterdir()) == []


def test_other_architectures_and_parts_are_refused(tmp_path: Path) -> None:
    model, program = llama_and_program()
    description = describe(model)
    for settings, words in (
        ({"hidden_act": "gelu"}, "the model has gelu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "type yarn"),
    ):
        changed = dataclasses.replace(description, settings=dict(description.settings) | settings)
        with pytest.raises(UnsupportedError, match=words):
            architecture_of(changed)
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel is not written as GGUF"):
        architecture_of(describe(gpt2()))
    assert architecture_of(description).name == "llama"
    with pytest.raises(UserInputError, match="this program has none"):
        qc.export_model(program, tmp_path / "a.gguf", GGUF)
    with pytest.raises(UserInputError, match="the described model"):
        write(causal_lm(intermediate_size=128), program, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_adapters_have_to_be_folded(tmp_path: Path) -> None:
    model, program = llama_and_program()
    for stage, words in (("adapted", "adapters are not folded"), ("float", "not quantized")):
        with pytest.raises(PreconditionError, match=words):
            write(model, dataclasses.replace(program, stage=stage), tmp_path)


def test_unknown_tokenizers_are_refused(tmp_path: Path, model_folder_words: Path) -> None:
    model, program = llama_and_program()
    with pytest.raises(UnsupportedError, match="no rule of llama.cpp is known for a WordLevel"):
        qc.export_model(
            program, tmp_path / "a.gguf", GGUF, model=model, tokenizer=model_folder_words
        )
    with pytest.raises(UserInputError, match="holds no tokenizer"):
        qc.export_model(program, tmp_path / "a.gguf", GGUF, model=model, tokenizer=tmp_path)


@pytest.fixture
def model_folder_words(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "words"
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_file_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, program = llama_and_program()
    path = write(model, program, tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserInputError, match="already exists"):
        write(model, program, tmp_path)
    with pytest.raises(UserInputError, match="does not end in .gguf"):
        qc.export_model(program, tmp_path / "model.bin", GGUF, model=model)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError, match="No space left"):
        write(model, program, tmp_path, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == before


def test_metadata_of_another_kind_are_refused(tmp_path: Path) -> None:
    model, program = llama_and_program()
    save_description(model, tmp_path)
    folder = tmp_path / "model"
    other = gguf.GGUFWriter(folder / "metadata.gguf", "qwen2")
    for step in (other.write_header_to_file, other.write_kv_data_to_file, other.close):
        step()
    with pytest.raises(UserInputError, match="describes a model of kind qwen2"):
        qc.export_model(program, tmp_path / "b.gguf", GGUF, model=folder)
    (folder / "metadata.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(UserInputError, match="truncated or not a GGUF file"):
        qc.export_model(program, tmp_path / "b.gguf", GGUF, model=folder)
